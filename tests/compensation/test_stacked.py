"""The factors of stacks, stacked projections and few bits."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.compensation import low_rank_factors
from hf_lowbit.compensation.stacked import encoded_factors, stacked_factors, target_of_rounding
from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.nn.factors import decoded_factors, expand_low_rank
from hf_lowbit.rounding import round_to_nearest

torch.manual_seed(0)
ERRORS = torch.randn(3, 32, 48)
MOMENTS = [(x := torch.randn(99, 48) * torch.linspace(0.1, 3, 48)).T @ x / 99 for _ in range(2)]


def test_each_matrix_of_a_stack_has_its_own_weighting() -> None:
    weightings = [MOMENTS[0], None, MOMENTS[1].diagonal().sqrt()]
    a, b = stacked_factors(ERRORS, 4, branches=2, weighting=weightings)
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    product = expand_low_rank(a, b, 2)
    for error, weighting, found in zip(ERRORS, weightings, product, strict=True):
        for rows in (slice(0, 16), slice(16, 32)):  # gate and up
            own_a, own_b = low_rank_factors(error[rows], 4, weighting)
            torch.testing.assert_close(found[rows], own_b @ own_a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "branches"), [(8, 1), (8, 2), (4, 2)])
def test_codes_decode_to_nearly_the_same(bits: int, branches: int) -> None:
    exact = expand_low_rank(*decoded_factors(stacked_factors(ERRORS, 4, 16, branches), branches), branches)
    coded = expand_low_rank(*decoded_factors(stacked_factors(ERRORS, 4, bits, branches), branches), branches)
    assert (coded - exact).norm() < {8: 0.02, 4: 0.3}[bits] * exact.norm()


def test_given_factors_are_stored_as_they_are() -> None:
    a, b = (torch.randn(3, *size).bfloat16().float() for size in ((8, 48), (32, 4)))
    assert all(map(torch.equal, decoded_factors(encoded_factors(a, b, 16, 2), 2), (a, b)))
    for exact, coded in zip((a, b), decoded_factors(encoded_factors(a, b, 8, 2), 2), strict=True):
        assert coded.shape == exact.shape and (coded - exact).norm() < 0.01 * exact.norm()


def test_in_turns_less_is_left() -> None:
    """Specification, correctness test 9: the best iterate is no worse than the first."""
    spec = WeightSpec("int", 2, 16)

    def left(target: torch.Tensor) -> float:
        rest = ERRORS - torch.stack([decode(round_to_nearest(part, spec)) for part in target])
        factors = stacked_factors(rest, 4, 16, 2)
        return float((rest - expand_low_rank(*decoded_factors(factors, 2), 2)).norm())

    rounding = lambda weight: decode(round_to_nearest(weight, spec))  # noqa: E731
    once = target_of_rounding(ERRORS, rounding, 4, 1, branches=2)
    assert torch.equal(once, ERRORS)
    assert left(target_of_rounding(ERRORS, rounding, 4, 5, branches=2)) < 0.99 * left(once)
