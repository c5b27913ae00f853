"""Factors of 8 and 4 bits: stored as codes, fitted to each other as stored."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.compensation import low_rank_factors, weighted_error
from hf_lowbit.compensation.low_bit_factors import low_bit_factors
from hf_lowbit.formats import decode
from hf_lowbit.formats.factors import factor_spec
from tests.compensation.test_low_rank import METRICS, problem, weighting

SHAPES = [(64, 96), (96, 64), (50, 37)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_they_are_codes_of_the_stored_format(shape: tuple[int, int], bits: int) -> None:
    error, _ = problem(shape)
    found = low_bit_factors(error, 6, bits)
    for packed, width in ((found.a, shape[1]), (found.b, shape[0])):
        spec = factor_spec(bits, width)
        shapes = {suffix: (tuple(t.shape), t.dtype) for suffix, t in packed.tensors().items()}
        assert packed.spec == spec and shapes == spec.companions((6,), width)
    a, b = found.decoded()
    assert torch.equal(a, decode(found.a)) and torch.equal(b, decode(found.b).T)


@pytest.mark.parametrize("width", [64, 96, 50, 37, 8])
def test_scales_take_at_most_a_bit_per_value_but_in_short_rows(width: int) -> None:
    group = factor_spec(8, width).group_size
    assert group is None or (width % group == 0 and 16 <= group <= 64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_refitting_never_loses_and_eight_bits_are_nearly_exact(shape: tuple[int, int], metric: str) -> None:
    error, inputs = problem(shape, tokens=400)
    own = weighting(metric, inputs)

    def left(a: torch.Tensor, b: torch.Tensor) -> float:
        return weighted_error(error - b @ a, own).item()

    whole, exact = weighted_error(error, own).item(), left(*low_rank_factors(error, 6, own))
    repaired = {}
    for bits in (8, 4):
        rounds = [left(*low_bit_factors(error, 6, bits, own, n).decoded()) for n in (0, 1, 5)]
        assert exact * (1 - 1e-6) <= rounds[2] <= rounds[1] <= rounds[0]
        repaired[bits] = (whole - rounds[2]) / (whole - exact)
        if bits == 4:
            assert rounds[2] < rounds[0]
    assert repaired[8] > 0.998 and repaired[8] > repaired[4] > 0.9


def test_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        low_bit_factors(torch.randn(8, 16), 0, 8)
