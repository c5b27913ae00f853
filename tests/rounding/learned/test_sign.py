"""SignRound: what it learns, and how it begins from codes of other methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.learned import SignRounding
from tests.rounding.learned.toy import (
    SPECS,
    codes_of,
    correlated_inputs,
    errors_on_held_out,
    every_integer,
    every_spec,
    gaussian,
    layer_weight,
    train,
)

OTHERS = [
    WeightSpec("nf", 4, 16),
    WeightSpec("nf", 3, None, symmetric=False),
    WeightSpec("fp_e2m1", 4, 16),
    WeightSpec("power", 3, 16, exponent=0.5),
    WeightSpec("codebook", 3, 16),
    WeightSpec("ternary", 2, 16),
]


def noisy_start(weight: Tensor, spec: WeightSpec, noise: float) -> PackedTensor:
    """The weight's own grid with codes of a disturbed weight, as compensating methods choose them."""
    own = round_to_nearest(weight, spec)
    disturbed = SignRounding(weight, spec, own, reach=50.0)
    with torch.no_grad():
        disturbed.shift += noise * gaussian(*disturbed.shift.shape, seed=4)
    return disturbed.pack()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits > 1], ids=lambda spec: spec.json)
def test_a_start_s_codes_are_the_first_codes(spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    start = noisy_start(weight, spec, 1.0)
    assert (codes_of(start) != codes_of(round_to_nearest(weight, spec))).float().mean() > 0.1
    learned = SignRounding(weight, spec, start, reach=50.0)
    assert torch.equal(decode(learned.pack()), decode(start)) or torch.allclose(learned().detach(), decode(start))


@every_integer
def test_within_half_a_step_a_start_s_codes_are_kept_where_they_neighbour_the_weight(spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    start = noisy_start(weight, spec, 0.5)
    learned = SignRounding(weight, spec, start)
    assert learned.shift.abs().max() <= 0.5
    steps_away = (codes_of(start) - codes_of(round_to_nearest(weight, spec))).abs()
    kept = codes_of(learned.pack()) == codes_of(start)
    scale = decode(start) - weight
    position_scale = learned.ungrouped(learned.base_scale.unsqueeze(-1).expand_as(learned.weight))
    neighbour = (scale.abs() / position_scale) < 0.999
    assert kept[neighbour].all() and (steps_away[neighbour] == 1).any()


def test_a_start_moved_just_past_a_border_returns_as_easily_as_it_left() -> None:
    spec = WeightSpec("int", 4, None, scale_dtype="float32")
    weight = torch.tensor([[7.5, 0.4, 1.3, 2.0]])  # the scale is 1
    start = round_to_nearest(torch.tensor([[7.5, 0.6, 1.6, 2.0]]), spec)
    learned = SignRounding(weight, spec, start)
    assert torch.allclose(learned.shift.detach().flatten(), torch.tensor([0.0, 0.2, 0.4, 0.0]), atol=1e-4)


@every_integer
@pytest.mark.parametrize("reach", [0.5, 1.5])
def test_codes_move_as_far_as_reach_allows(spec: WeightSpec, reach: float) -> None:
    weight = gaussian(6, 48)
    learned = SignRounding(weight, spec, reach=reach, learn_range=False)
    with torch.no_grad():
        learned.shift += 100 * gaussian(*learned.shift.shape, seed=3).sign()
    learned.constrain_()
    moved = (codes_of(learned.pack()) - codes_of(round_to_nearest(weight, spec))).abs()
    assert moved.max() == round(reach + 0.5)
    assert [group["params"] for group in learned.parameter_groups()] == [[learned.shift]]


@every_integer
def test_range_factors_receive_the_gradients_of_plain_autograd(spec: WeightSpec) -> None:
    """The published formula with (round(x) - x).detach() + x, differentiated by autograd."""
    weight, outer = gaussian(6, 48), gaussian(6, 48, seed=5)
    learned = SignRounding(weight, spec, alpha=0.8, beta=0.9)
    with torch.no_grad():
        learned.shift += 0.4 * gaussian(*learned.shift.shape, seed=3).clamp(-1, 1)
    (learned() * outer).sum().backward()

    def straight(exact: Tensor, replaced: Tensor) -> Tensor:
        return (replaced - exact).detach() + exact

    alpha, beta, shift = (p.detach().clone().requires_grad_() for p in (learned.alpha, learned.beta, learned.shift))
    groups = learned.weight
    first, last = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    if spec.symmetric:
        exact, zero = alpha * learned.base_scale, torch.zeros_like(alpha)
        scale = straight(exact, exact.bfloat16().float())
    else:
        high, low = alpha * groups.amax(-1).clamp(min=0), beta * groups.amin(-1).clamp(max=0)
        exact = (high - low) / (last - first)
        scale = straight(exact, exact.bfloat16().float())
        free = first - low / scale
        zero = straight(free, free.round()).clamp(first, last)
    x = groups / scale.unsqueeze(-1) + zero.unsqueeze(-1) + shift
    code = straight(x, x.round()).clamp(first, last)
    expected = ((code - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(6, 48)
    assert torch.allclose(expected, learned(), atol=1e-6)
    (expected * outer).sum().backward()
    assert torch.allclose(learned.shift.grad, shift.grad, atol=1e-5)
    assert torch.allclose(learned.alpha.grad, alpha.grad, rtol=1e-3, atol=1e-4)
    if not spec.symmetric:
        assert torch.allclose(learned.beta.grad, beta.grad, rtol=1e-3, atol=1e-4)


@every_integer
def test_training_beats_round_to_nearest_on_held_out_inputs(spec: WeightSpec) -> None:
    weight = layer_weight()
    learned = SignRounding(weight, spec)
    train(learned, weight, correlated_inputs(256, 64, seed=1), steps=200, rate=1 / 200, optimizer="sign")
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.8 * nearest


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: spec.json)
def test_training_beats_round_to_nearest_in_every_format(spec: WeightSpec) -> None:
    weight = layer_weight()
    learned = SignRounding(weight, spec)
    train(learned, weight, correlated_inputs(256, 64, seed=1), steps=200, rate=1 / 200, optimizer="sign")
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.8 * nearest


@every_spec
def test_bounds_hold_after_any_step(spec: WeightSpec) -> None:
    learned = SignRounding(gaussian(6, 48), spec, reach=0.7)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += 10 * gaussian(*parameter.shape, seed=1)
    learned.constrain_()
    assert learned.shift.abs().max() <= 0.7
    assert learned.alpha.min() >= 0.05 and learned.alpha.max() <= 1 and torch.isfinite(learned()).all()


@pytest.mark.parametrize("reach", [0.0, -1.0, float("inf"), float("nan")])
def test_a_reach_that_is_no_length_is_refused(reach: float) -> None:
    with pytest.raises(RoundingError, match="reach must be"):
        SignRounding(gaussian(4, 32), WeightSpec(), reach=reach)
