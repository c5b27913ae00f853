"""LDLQ and its greedy passes: tests 5, 6 and 8 of QuIP's method page, and the range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales, zero_points
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.gptq import gptq
from hf_lowbit.rounding.ldlq import fit_mean_square, improve_greedily, ldlq
from hf_lowbit.rounding.store import round_with

ROWS, COLUMNS = 16, 64
SPEC = WeightSpec(bits=4, group_size="tensor", symmetric=False, real_zero_point=True, scale_dtype="float32")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    x = gaussian(4 * columns, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 1000)
    return x.t() @ x / len(x)


def damped(h: Tensor, damping: float = 0.01) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def proxy(weight: Tensor, packed: PackedTensor, h: Tensor) -> float:
    error = weight.double() - decode(packed).double()
    return ((error @ h) * error).sum().item()


def codes(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_is_quips(bits: int) -> None:
    """w = (2 q / (2^b - 1) - 1) s with s = 2.4 sqrt(mean w^2)."""
    weight = gaussian(ROWS, COLUMNS).float()
    packed = ldlq(weight, replace(SPEC, bits=bits), torch.eye(COLUMNS)).packed
    s = 2.4 * weight.square().mean().sqrt()
    levels = (2 * codes(packed).double() / (2**bits - 1) - 1) * s
    torch.testing.assert_close(decode(packed).double(), levels, rtol=1e-5, atol=1e-6)
    assert packed.scale.numel() == 1 and zero_points(packed).tolist() == [[-0.5]]
    assert len(decode(packed).unique()) == 2**bits


@pytest.mark.parametrize(
    "values", [{"group_size": None}, {"group_size": 16}, {"symmetric": True, "real_zero_point": False}], ids=str
)
def test_other_groups_and_grids_follow_the_mean_square(values: dict[str, Any]) -> None:
    weight, spec = gaussian(ROWS, COLUMNS).float(), replace(SPEC, **values)
    packed = round_with(fit_mean_square, weight, spec)
    groups = weight.reshape(1, 1, -1) if spec.group_size == "tensor" else weight.reshape(ROWS, spec.groups(COLUMNS), -1)
    torch.testing.assert_close(scales(packed) * 15 / 2, 2.4 * groups.square().mean(-1).sqrt())


def test_ternary_and_one_bit_keep_their_own_grids() -> None:
    weight = gaussian(ROWS, COLUMNS).float()
    for spec in (WeightSpec("ternary", 2), WeightSpec(bits=1)):
        assert torch.equal(round_with(fit_mean_square, weight, spec).scale, round_to_nearest(weight, spec).scale)


# 5
def test_equality_with_the_pages_ldlq() -> None:
    """H = L D L^T with a unit lower L; columns from the last to the first, in the page's own units."""
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    packed = ldlq(weight, SPEC, h, reach=5.0).packed
    s = 5 * weight.square().mean().sqrt()
    w = ((weight / s + 1) / 2 * 15).flip(1)
    lower = torch.linalg.cholesky(damped(h).flip(0, 1))
    feedback = lower / lower.diagonal() - torch.eye(COLUMNS, dtype=h.dtype)
    q = torch.zeros_like(w)
    for i in reversed(range(COLUMNS)):
        q[:, i] = (w[:, i] + (w - q)[:, i:] @ feedback[i:, i]).add(0.5).floor().clamp(0, 15)
    assert torch.equal(codes(packed), q.flip(1).to(torch.uint8))
    assert int(codes(packed).min()) > 0 and int(codes(packed).max()) < 15, "nothing was meant to saturate"


# 6
def test_less_is_lost_than_rounding_to_nearest() -> None:
    ratios = []
    for seed in range(10):
        weight, h = gaussian(ROWS, COLUMNS, seed=seed), correlated(seed)
        near = proxy(weight, round_with(fit_mean_square, weight, SPEC), h)
        ratios.append(proxy(weight, ldlq(weight, SPEC, h).packed, h) / near)
    assert sum(ratios) / 10 < 0.5


def test_with_a_diagonal_hessian_it_is_rounding_to_nearest() -> None:
    weight = gaussian(ROWS, COLUMNS)
    h = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)).double().add(0.1).diag()
    near = round_with(fit_mean_square, weight, SPEC)
    for passes in (0, 3):
        assert torch.equal(ldlq(weight, SPEC, h, greedy_passes=passes).packed.weight, near.weight)


# 8
def test_the_expected_error_is_a_twelfth_of_the_trace_of_d() -> None:
    weight, h, spec = gaussian(256, COLUMNS), correlated(), replace(SPEC, bits=8)
    result = ldlq(weight, spec, h, reach=8.0)
    d = torch.linalg.cholesky(damped(h).flip(0, 1)).diagonal().square().sum()
    step = scales(result.packed).double().item()
    assert result.loss / (256 * step**2 / 12 * d.item()) == pytest.approx(1, abs=0.1)


FORMATS = {
    **{f"int{bits}": replace(SPEC, bits=bits) for bits in (2, 3, 4, 8)},
    "rows": replace(SPEC, group_size=None),
    "groups": replace(SPEC, bits=2, group_size=16),
    "integer zero": WeightSpec(bits=3, group_size=16, symmetric=False),
    "symmetric": WeightSpec(bits=3),
    "one bit": WeightSpec(bits=1),
    "ternary": WeightSpec("ternary", 2),
    "nf4": WeightSpec("nf", 4, group_size=16),
    "fitted": WeightSpec("codebook", 2),
}


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_greedy_passes_never_make_it_worse(spec: WeightSpec) -> None:
    """Saturated codes included: the running error is that of the weights as they are stored."""
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    weight[:, :4] *= 3
    exact, losses = damped(h), []
    start = ldlq(weight, spec, h, reach=1.5).packed
    for passes in (0, 1, 2, 5):
        packed, loss = improve_greedily(weight, start, exact, passes)
        assert torch.equal(packed.scale, start.scale) and packed.spec == spec
        assert loss == pytest.approx(proxy(weight, packed, exact), rel=1e-4)
        losses.append(loss)
    assert losses[0] == pytest.approx(proxy(weight, start, exact), rel=1e-4)
    assert losses == sorted(losses, reverse=True) and losses[1] < losses[0]


def test_where_they_end_no_single_code_can_be_better() -> None:
    weight, h, spec = gaussian(4, 12), damped(correlated(columns=12)), replace(SPEC, bits=2)
    packed, loss = improve_greedily(weight, round_with(fit_mean_square, weight, spec), h, 50)
    values = decode(packed).double()
    for row in range(4):
        for column in range(12):
            for level in values.unique():
                other = values.clone()
                other[row, column] = level
                error = other - weight
                assert float(((error @ h) * error).sum()) >= loss * (1 - 1e-6)


def test_passes_across_blocks_see_each_other() -> None:
    """300 columns in blocks of 128: the loss that is kept up to date is the true one."""
    weight, h = gaussian(8, 300), damped(correlated(columns=300))
    packed, loss = improve_greedily(weight, round_with(fit_mean_square, weight, SPEC), h, 3)
    assert loss == pytest.approx(proxy(weight, packed, h), rel=1e-6)
    assert loss < 0.5 * proxy(weight, round_with(fit_mean_square, weight, SPEC), h)


def test_ldlq_rg_rounds_the_largest_diagonal_first() -> None:
    weight, h = gaussian(ROWS, COLUMNS).float(), correlated().float()
    fit = {"grid_fit": lambda *arguments: fit_mean_square(*arguments, reach=2.4)}
    first = gptq(weight, SPEC, h, act_order=True, **fit)
    improved, loss = improve_greedily(weight, first.packed, damped(h), 2)
    result = ldlq(weight, SPEC, h, greedy_passes=2)
    assert torch.equal(result.packed.weight, improved.weight) and result.loss == pytest.approx(loss)
    assert result.loss < ldlq(weight, SPEC, h).loss


def test_a_searched_range_loses_less_at_two_bits() -> None:
    weight, h, spec = gaussian(ROWS, COLUMNS), correlated(), replace(SPEC, bits=2)
    searched = ldlq(weight, spec, h, reach=None)
    assert torch.equal(searched.packed.weight, gptq(weight, spec, h, grid_fit=fit_clipped).packed.weight)
    assert searched.loss < ldlq(weight, spec, h).loss


def test_what_cannot_be_rounded_is_refused() -> None:
    weight = gaussian(ROWS, COLUMNS)
    weight[2, 3] = float("nan")
    with pytest.raises(RoundingError, match="NaN"):
        ldlq(weight, SPEC, correlated())
    with pytest.raises(RoundingError, match="no Hessian"):
        ldlq(gaussian(ROWS, COLUMNS), SPEC, correlated(columns=32))
