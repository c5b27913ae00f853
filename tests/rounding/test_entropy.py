"""Information calibration: the numbered tests of its method page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales, zero_points
from hf_lowbit.rounding import RoundingError
from hf_lowbit.rounding.entropy import code_entropy, fit_entropy
from hf_lowbit.rounding.grid import Grid, fit_grid, shifted_grid
from hf_lowbit.rounding.store import round_with

NF4 = WeightSpec("nf", 4, 64, symmetric=False, scale_dtype="float32")
CODED = WeightSpec("nf", 4, 64, symmetric=False, scale_bits=8, scale_group=256)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def skewed(*shape: int) -> Tensor:
    return normal(*shape).exp() + normal(*shape, seed=1).abs() - 1


def counted(codes: Tensor) -> Tensor:
    """Entropy of the codes of each group of 64, as the authors count it."""
    share = torch.nn.functional.one_hot(codes.long().unflatten(-1, (-1, 64)), 16).double().mean(-2)
    return -torch.special.xlogy(share, share).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def codes_of(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns)


def entropies(weight: Tensor, **options: Any) -> Tensor:
    grouped = weight.unflatten(-1, (-1, 64))
    grid = fit_entropy(grouped, NF4, NF4.number_format, **options)
    return code_entropy(grouped.sort(-1).values, grid, NF4.number_format)


# 1
@pytest.mark.parametrize("weight", [normal(32, 256), skewed(32, 256)], ids=["normal", "skewed"])
def test_no_group_has_less_entropy_than_around_its_median(weight: Tensor) -> None:
    median, best = entropies(weight, steps=0), entropies(weight, steps=20)
    assert (best >= median).all() and best.mean() > median.mean() + 0.01
    grouped = weight.unflatten(-1, (-1, 64)).sort(-1).values
    unshifted = code_entropy(grouped, fit_grid(grouped, NF4, NF4.number_format), NF4.number_format)
    largest = grouped.abs().amax(-1)
    plain = code_entropy(grouped, Grid(largest, torch.zeros_like(largest)), NF4.number_format)
    assert best.mean() > max(plain.mean(), unshifted.mean())


def test_more_candidates_find_more() -> None:
    assert (entropies(skewed(16, 256), steps=100) >= entropies(skewed(16, 256), steps=20)).all()


# 2
def test_entropies_are_those_of_the_codes() -> None:
    weight = skewed(32, 256)
    packed = round_with(fit_entropy, weight, NF4)
    exact = counted(codes_of(packed))
    torch.testing.assert_close(entropies(weight).double(), exact, rtol=0, atol=1e-5)
    assert (exact > 0).all() and (exact <= 4).all()


# 3
def test_the_shift_is_constant_in_each_group() -> None:
    packed = round_with(fit_entropy, skewed(300, 128), CODED)
    table_part = packed.spec.number_format.decode(codes_of(packed)).unflatten(-1, (-1, 64)) * scales(packed)[..., None]
    shift = decode(packed).unflatten(-1, (-1, 64)) - table_part
    torch.testing.assert_close(shift, shift.mean(-1, keepdim=True).expand_as(shift), rtol=0, atol=1e-7)


# 4
def test_a_constant_moves_the_shift_alone() -> None:
    weight = skewed(16, 128).double()
    constant = torch.linspace(-0.05, 0.05, 32, dtype=torch.float64).reshape(16, 2).repeat_interleave(64, 1)
    before, after = (round_with(fit_entropy, w.float(), NF4) for w in (weight, weight + constant))
    assert (codes_of(before) == codes_of(after)).double().mean() > 0.995  # but for float32's ties
    moved = [-zero_points(p) * scales(p) for p in (before, after)]  # type: ignore[operator]
    torch.testing.assert_close(moved[1] - moved[0], constant[:, ::64].float(), rtol=0, atol=2e-3)


# 7
def test_coded_shifts_are_within_half_a_step() -> None:
    weight = skewed(256, 128)
    exact = fit_entropy(weight.unflatten(-1, (-1, 64)), CODED.first_level, CODED.number_format)
    packed = round_with(fit_entropy, weight, CODED)
    stored = zero_points(packed)
    assert stored is not None
    step = (exact.zero_point.amax(0) - exact.zero_point.amin(0)) / 255
    rounding = exact.zero_point.abs().amax(0) * 2**-7  # offset and step are bfloat16
    assert ((stored - exact.zero_point).abs() <= step / 2 + rounding).all()


# 8
def test_a_symmetric_group_is_shifted_little() -> None:
    half = normal(64, 32).abs() + 1e-4
    weight = torch.cat([half, -half], 1)
    grid = fit_entropy(weight.unsqueeze(1), NF4, NF4.number_format)
    size = weight.abs().amax(-1)
    median = weight.sort(-1).values[:, 31].abs()  # the lower one
    shift = (grid.zero_point * grid.scale).abs().squeeze(1)
    assert (shift <= 0.0542 * (size + median) + median).all()


def test_groups_far_from_zero_and_constant_ones() -> None:
    weight = normal(8, 64)
    weight[0], weight[1], weight[2] = 0.0, 0.25, 5 + weight[2] / 100
    packed = round_with(fit_entropy, weight, NF4)
    torch.testing.assert_close(decode(packed)[:2], weight[:2], rtol=1e-5, atol=0)
    assert zero_points(packed).abs().max() <= 4.001  # type: ignore[union-attr]


def test_integers_have_scaled_ranges() -> None:
    spec = WeightSpec("int", 4, 64, symmetric=False, scale_dtype="float32")
    grouped = skewed(16, 256).unflatten(-1, (-1, 64)).sort(-1).values
    best, range_ = (fit(grouped, spec, spec.number_format) for fit in (fit_entropy, fit_grid))
    entropy, start = (code_entropy(grouped, grid, spec.number_format) for grid in (best, range_))
    assert (entropy >= start).all() and entropy.mean() > start.mean()
    assert ((best.scale / range_.scale - 1).abs() <= 0.1001).all()
    packed = round_with(fit_entropy, grouped.flatten(1), spec)
    torch.testing.assert_close(counted(codes_of(packed)), entropy.double(), rtol=0, atol=0.02)  # ties


def test_formats_that_do_not_follow_the_range_keep_their_grid() -> None:
    spec = WeightSpec("int", 1, 64, symmetric=False)
    grouped = skewed(4, 128).unflatten(-1, (-1, 64))
    assert all(
        map(torch.equal, fit_entropy(grouped, spec, spec.number_format), fit_grid(grouped, spec, spec.number_format))
    )


def test_shifted_grid_and_weights_that_are_not_finite() -> None:
    grid = shifted_grid(torch.tensor([[0.5]]), torch.tensor([[0.25]]), NF4)
    assert (grid.scale.item(), grid.zero_point.item()) == (0.5, -0.5)
    with pytest.raises(RoundingError, match="NaN or infinite"):
        round_with(fit_entropy, torch.full((2, 64), torch.nan), NF4)
