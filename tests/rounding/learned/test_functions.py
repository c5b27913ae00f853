"""Closed-form gradients against finite differences and plain autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec, get_format
from hf_lowbit.rounding.learned.functions import nearest, position, quantize, stored
from hf_lowbit.rounding.learned.levels import Levels
from hf_lowbit.rounding.learned.power import power_values, soft_power
from hf_lowbit.rounding.learned.soft import (
    FIRST_BETA,
    LAST_BETA,
    beta_at,
    interpolate,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
)
from tests.rounding.learned.toy import gaussian

FORMATS = [
    get_format("int", 2),
    get_format("int", 4),
    get_format("nf", 4),
    get_format("fp_e2m1", 4),
    get_format("power", 4, 0.3),
    get_format("ternary", 2),
    get_format("int", 1),
    get_format("float8_e4m3fn", 8),
]
every_format = pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f"{f.name}-{f.bits}")


def make(number_format: NumberFormat, symmetric: bool) -> tuple[Levels, dict[str, Tensor | None]]:
    """Weights of which about a tenth lie beyond the grid."""
    levels = Levels(number_format, torch.device("cpu"))
    weight = gaussian(3, 2, 40).double()
    scale = (gaussian(3, 2, seed=1).abs().double() + 1) * 1.6 / max(-levels.low, levels.high) / 1.5
    zero = None if symmetric else gaussian(3, 2, seed=2).double().mul(0.2 * levels.high).round()
    shift = (torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(3)) - 0.5).double()
    return levels, {"weight": weight, "shift": shift, "scale": scale, "zero_point": zero}


@every_format
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_quantize_are_those_with_rounding_held_fixed(number_format: NumberFormat, symmetric: bool) -> None:
    """Straight through: what rounding and clamping added to each weight is constant, the rest is differentiated."""
    levels, at = make(number_format, symmetric)
    weight, shift, scale, zero = at["weight"], at["shift"], at["scale"], at["zero_point"]
    assert weight is not None and shift is not None and scale is not None
    index = nearest(weight, shift, scale, zero, levels)
    moved = position(weight, scale, zero, levels) + shift
    within = (moved > -0.5) & (moved < len(levels) - 0.5)
    assert within.any() and (number_format.bits == 8 or not within.all())
    values, steps = levels.values.double(), levels.steps.double()
    units = weight / scale.unsqueeze(-1) + (0 if zero is None else zero.unsqueeze(-1))
    step = steps[levels.interval(units.float())]

    def held(shift: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        z = torch.zeros_like(scale) if zero is None else zero
        free = weight / scale.unsqueeze(-1) + z.unsqueeze(-1) + shift * step
        offset = values[index] - (units + at["shift"] * step)
        return (torch.where(within, free + offset, values[index]) - z.unsqueeze(-1)) * scale.unsqueeze(-1)

    leaves = [x if x is None else x.clone().requires_grad_() for x in (shift, scale, zero)]
    assert leaves[1] is not None
    out = quantize(weight, leaves[0], leaves[1], leaves[2], levels)
    assert torch.allclose(out, held(shift, scale, zero), atol=1e-12)
    outer = gaussian(3, 2, 40, seed=5).double()
    (out * outer).sum().backward()
    for number, leaf in enumerate(leaves):
        if leaf is None:
            continue
        ends = []
        for side in (1e-6, -1e-6):
            moved_leaves = [shift, scale, zero]
            moved_leaves[number] = leaf.detach() + side
            ends.append(held(*moved_leaves) * outer)  # type: ignore[arg-type]
        slope = (ends[0] - ends[1]) / 2e-6
        expected = slope if number == 0 else slope.sum(-1)
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, expected, rtol=1e-5, atol=1e-6)
        assert leaf.grad.abs().max() > 0


@every_format
def test_float32_levels_are_those_of_float64(number_format: NumberFormat) -> None:
    """The fast count of edges and the search that float64 takes agree, on the edges too."""
    levels = Levels(number_format, torch.device("cpu"))
    spread = gaussian(4000) * levels.high
    around = torch.cat([levels.values, levels.values.nextafter(spread.new_tensor(torch.inf)), -levels.values.flip(0)])
    x = torch.cat([spread, around, spread.new_tensor([0.0, 1e30, -1e30])])
    expected = torch.searchsorted(levels.values, x, right=True).sub(1).clamp(0, len(levels) - 2)
    assert torch.equal(levels.interval(x).long(), expected)
    assert torch.equal(levels.interval(x.double()).long(), expected)


def test_stored_values_are_exact_and_their_gradient_the_identity() -> None:
    values = gaussian(100).requires_grad_()
    out = stored(values, "bfloat16")
    assert torch.equal(out, values.detach().bfloat16().float())
    out.sum().backward()
    assert torch.equal(values.grad, torch.ones(100))


def test_gradients_of_soft_rounding() -> None:
    logits = (gaussian(3, 2, 8).double() * 1.2).requires_grad_()
    lower, span = gaussian(3, 2, 8, seed=1).double(), gaussian(3, 2, 8, seed=2).double().abs()
    scale = gaussian(3, 2, seed=3).double().abs().requires_grad_()
    assert torch.autograd.gradcheck(interpolate, (logits, lower, span, scale))
    assert torch.autograd.gradcheck(lambda a: rounding_penalty(rectified_sigmoid(a), 3.5), (logits,))


@pytest.mark.parametrize("logit", [torch.inf, -torch.inf, 5.0, -5.0])
def test_no_gradient_where_the_rectified_sigmoid_is_saturated(logit: float) -> None:
    logits = torch.full((1, 1, 4), logit, requires_grad=True)
    out = interpolate(logits, torch.zeros(1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 1))
    assert torch.equal(out.detach(), torch.full((1, 1, 4), float(logit > 0)))
    (out.sum() + rounding_penalty(rectified_sigmoid(logits), 4.0)).backward()
    assert logits.grad is not None and (logits.grad == 0).all()


def test_the_rectified_sigmoid_is_inverted() -> None:
    fraction = torch.linspace(0, 1, 101)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(fraction)), fraction, atol=1e-6)
    assert inverse_rectified_sigmoid(torch.tensor(0.0)).item() == pytest.approx(-2.40, abs=0.01)


def test_beta_waits_then_falls_linearly() -> None:
    assert beta_at(0.0) is None and beta_at(0.19) is None
    assert [beta_at(p) for p in (0.2, 0.6, 1.0, 1.5)] == pytest.approx([FIRST_BETA, 11.0, LAST_BETA, LAST_BETA])


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.9])
def test_the_gradient_of_the_exponent(exponent: float) -> None:
    """Finite with codes of zero, and that of finite differences (test 6 of the method page)."""
    codes = torch.cat([torch.zeros(5), gaussian(59) * 3]).clamp(-7, 7).double().reshape(2, 2, 16)
    scale, outer = gaussian(2, 2, seed=1).abs().double(), gaussian(2, 2, 16, seed=2).double()

    def loss(a: Tensor) -> Tensor:
        return (soft_power(codes, a, scale, 7, 0.1) * outer).sum()

    a = torch.tensor(exponent, dtype=torch.float64, requires_grad=True)
    loss(a).backward()
    with torch.no_grad():
        expected = (loss(a + 1e-6) - loss(a - 1e-6)) / 2e-6
    assert a.grad is not None and a.grad.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_of_the_power_format_s_scale() -> None:
    codes, outer = (gaussian(2, 2, 16) * 3).clamp(-7, 7).double(), gaussian(2, 2, 16, seed=2).double()
    exponent = torch.tensor(0.6, dtype=torch.float64)
    scale = gaussian(2, 2, seed=1).abs().double().requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return (soft_power(codes, exponent, values, 7, 0.1) * outer).sum()

    loss(scale).backward()
    with torch.no_grad():
        steps = 1e-6 * torch.eye(4).double().reshape(4, 2, 2)
        expected = torch.stack([loss(scale + step) - loss(scale - step) for step in steps])
    assert scale.grad is not None and torch.allclose(scale.grad.flatten(), expected / 2e-6, rtol=1e-6)


def test_the_gradient_of_codes_is_the_slope_between_neighbours_and_not_zero_at_zero() -> None:
    exponent = torch.tensor(0.5, dtype=torch.float64)
    codes = torch.tensor([[[0.0, 0.2, -0.3, 3.4, 6.9, -6.9]]], dtype=torch.float64, requires_grad=True)
    soft_power(codes, exponent, torch.full((1, 1), 2.0).double(), 7, 0.05).sum().backward()
    values = power_values(exponent, 7, torch.float64)[0]
    assert codes.grad is not None
    for code, slope in zip(codes.flatten().tolist(), codes.grad.flatten().tolist(), strict=True):
        low = int(code // 1) + 7
        assert slope == pytest.approx(2 * (values[low + 1] - values[low]).item()) and slope > 0


def test_power_values_are_the_format_s_own() -> None:
    """The look-up table equals the formula, and is odd and monotone (tests 8 and 9 of the method page)."""
    values = power_values(torch.tensor(0.43), 7, torch.float32)[0]
    spec = WeightSpec("power", 4, exponent=float(torch.tensor(0.43)))
    assert torch.equal(values, spec.number_format.table[1:])
    assert torch.equal(values, -values.flip(0)) and (values.diff() > 0).all()
