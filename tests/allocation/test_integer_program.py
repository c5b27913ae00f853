"""The integer program finds what trying everything finds."""

from __future__ import annotations

import itertools
import random

import pytest

from hf_lowbit.allocation import AllocationError, Option, allocate


def totals(options: list[list[Option]], picks: tuple[int, ...] | list[int]) -> tuple[float, int]:
    chosen = [choices[pick] for choices, pick in zip(options, picks, strict=True)]
    return sum(option.loss for option in chosen), sum(option.bits for option in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_optimum(seed: int) -> None:
    chance = random.Random(seed)
    options = [
        [Option(chance.randrange(10, 100), chance.uniform(0, 1)) for _ in range(chance.randrange(1, 5))]
        for _ in range(6)
    ]
    budget = sum(min(o.bits for o in choices) for choices in options) + chance.randrange(0, 200)
    every = itertools.product(*(range(len(choices)) for choices in options))
    best = min(totals(options, picks)[0] for picks in every if totals(options, picks)[1] <= budget)
    loss, bits = totals(options, allocate(options, budget))
    assert bits <= budget and loss == pytest.approx(best, rel=1e-6)


def test_of_equal_losses_the_smaller_is_taken() -> None:
    assert allocate([[Option(8, 1.0), Option(4, 1.0)]] * 3, 1000) == [1, 1, 1]


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(AllocationError, match="40 to 80"):
        allocate([[Option(20, 1.0), Option(40, 0.5)]] * 2, 39)
    assert allocate([[Option(20, 1.0), Option(40, 0.5)]] * 2, 40) == [0, 0]


def test_bad_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="sensitivity"):
        allocate([[Option(1, float("nan"))]], 10)
    with pytest.raises(ValueError, match="at least one"):
        allocate([[]], 10)
