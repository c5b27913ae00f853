"""Rounding and factors in turns: the best turn is kept, and what rounds is what is judged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.compensation import alternate, low_rank_factors, weighted_error
from hf_lowbit.compensation.low_bit_factors import low_bit_factors
from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.rounding import round_to_nearest

SPEC = WeightSpec("int", 2, 16)


def rounding(weight: Tensor) -> Tensor:
    return decode(round_to_nearest(weight, SPEC))


def weights(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 64, generator=generator) * torch.logspace(-1, 1, 64)
    return torch.randn(48, 64, generator=generator), inputs.T @ inputs / 200


def test_one_turn_is_the_plain_compensation() -> None:
    weight, moment = weights()
    for own in (None, moment):
        found = alternate(weight, 8, rounding, 1, own)
        a, b = low_rank_factors(weight - rounding(weight), 8, own)
        assert torch.equal(found.target, weight) and torch.equal(found.rounded, rounding(weight))
        assert torch.equal(found.a, a) and torch.equal(found.b, b) and found.best == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_turn_is_kept(weighted: bool) -> None:
    best = set()
    for seed in range(6):
        weight, moment = weights(seed)
        own = moment if weighted else None
        found = alternate(weight, 8, rounding, 5, own)
        assert len(found.errors) == 5 and found.errors[found.best] == min(found.errors) <= found.errors[0]
        left = weighted_error(weight - found.rounded - found.b @ found.a, own).item()
        assert left == pytest.approx(found.errors[found.best])
        assert torch.equal(found.rounded, rounding(found.target))
        best.add(found.best)
    assert max(best) > 0  # alternating helps on weights of two bits


def test_turns_that_only_make_it_worse_are_dropped() -> None:
    """A rounding that is exact once and coarse ever after."""
    weight, _ = weights()
    calls = iter([weight, torch.zeros_like(weight), torch.zeros_like(weight)])
    found = alternate(weight, 4, lambda _: next(calls), 3)
    assert found.best == 0 and found.errors[0] == pytest.approx(0, abs=1e-9) and found.errors[1] > 1


def test_factors_are_judged_as_they_are_stored() -> None:
    weight, moment = weights()

    def solve(error: Tensor, rank: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
        return low_bit_factors(error, rank, 4, own).decoded()

    coded = alternate(weight, 8, rounding, 3, moment, solve)
    left = weighted_error(weight - coded.rounded - coded.b @ coded.a, moment).item()
    assert left == pytest.approx(coded.errors[coded.best])
    assert coded.errors[0] > alternate(weight, 8, rounding, 1, moment).errors[0]


def test_no_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one turn, not 0"):
        alternate(torch.randn(8, 16), 2, rounding, 0)
