"""What layers that share their bits can become together, against every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from hf_lowbit.allocation import Option, combined


def layers(count: int, seed: int) -> list[list[Option]]:
    drawn = random.Random(seed)
    return [[Option(drawn.randrange(1, 9), drawn.random()) for _ in range(4)] for _ in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_the_front_holds_the_best_sum_of_every_size(seed: int) -> None:
    choices = layers(3, seed)
    front = combined(choices)
    every = [Option(sum(o.bits for o in picked), sum(o.loss for o in picked)) for picked in itertools.product(*choices)]
    for total, picks in front:
        picked = [own[pick] for own, pick in zip(choices, picks, strict=True)]
        assert total == Option(sum(o.bits for o in picked), pytest.approx(sum(o.loss for o in picked)))
    for budget in range(3, 30):
        best = min((o.loss for o in every if o.bits <= budget), default=None)
        found = min((total.loss for total, _ in front if total.bits <= budget), default=None)
        assert found == (best if best is None else pytest.approx(best))
    assert all(a.bits < b.bits and a.loss > b.loss for (a, _), (b, _) in itertools.pairwise(front))


def test_large_groups_keep_their_ends() -> None:
    """384 layers, such as a list of experts: the front stays small, from all that is smallest to all that is best."""
    choices = [[Option(10 * step, 1 / (1 + i + step)) for step in range(4)] for i in range(384)]
    front = combined(choices)
    assert len(front) <= 512
    assert set(front[0][1]) == {0} and set(front[-1][1]) == {3}
