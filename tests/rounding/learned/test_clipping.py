"""OmniQuant's learned weight clipping: the numbered tests of its method page that concern one weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.formats.packed import scales
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.learned import LearnedClipping, MovingClipping
from tests.rounding.learned.toy import (
    correlated_inputs,
    errors_on_held_out,
    every_integer,
    every_spec,
    gaussian,
    layer_weight,
    output_error,
    train,
)


# 1
@every_spec
def test_logits_of_four_shrink_the_range_by_their_sigmoid(spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    kept = torch.sigmoid(torch.tensor(4.0)).item()
    ratio = scales(LearnedClipping(weight, spec).pack()) / scales(round_to_nearest(weight, spec))
    assert kept == pytest.approx(0.982, abs=1e-4)
    assert torch.allclose(ratio, torch.full_like(ratio, kept), rtol=2.0**-7)  # two bfloat16 scales


# 4
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_reach_the_logits_through_the_scale_alone(symmetric: bool) -> None:
    """Finite differences of a loss with codes' rounding and the zero point held at their values."""
    spec = WeightSpec("int", 3, 16, symmetric, scale_dtype="float32")
    weight, outer = gaussian(4, 32), gaussian(4, 32, seed=1)
    learned = LearnedClipping(weight, spec, logit=1.5)
    out = learned()
    (out * outer).sum().backward()
    scale, zero = learned.grid()
    z = 0.0 if zero is None else zero.detach().unsqueeze(-1)
    s = scale.detach().double().unsqueeze(-1)
    units = learned.weight.double() / s + z
    codes = units.round().clamp(-4, 3)
    within = (units > -4.5) & (units < 3.5)

    def held(s: torch.Tensor) -> torch.Tensor:
        free = torch.where(within, learned.weight / s + z + (codes - units), codes)
        return ((free - z) * s * outer.reshape(4, 2, 16)).sum(-1)

    to_scale = (held(s + 1e-6) - held(s - 1e-6)) / 2e-6
    steep = 0.25 - (torch.sigmoid(torch.tensor(1.5)) - 0.5).square()
    high = learned.base.high if symmetric else learned.weight.amax(-1) / 7
    assert torch.allclose(learned.upper.grad.double(), to_scale * steep * high, rtol=1e-3, atol=1e-4)
    if not symmetric:
        low = -learned.weight.amin(-1) / 7
        assert torch.allclose(learned.lower.grad.double(), to_scale * steep * low, rtol=1e-3, atol=1e-4)


# 3, 6
@every_integer
def test_training_beats_round_to_nearest_on_held_out_inputs(spec: WeightSpec) -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    learned = LearnedClipping(weight, spec)
    losses = train(learned, weight, inputs, steps=200, rate=2e-2)
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < nearest
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.parametrize(
    "spec",
    [
        WeightSpec(name, bits, 16, symmetric, exponent=exponent)
        for name, bits, exponent in (("nf", 3, None), ("fp_e2m1", 4, None), ("power", 3, 0.6), ("codebook", 3, None))
        for symmetric in (True, False)
    ],
    ids=lambda spec: spec.json,
)
def test_training_beats_round_to_nearest_in_other_formats(spec: WeightSpec) -> None:
    """By the parameters of the lowest loss in training: the way there is not steady."""
    weight, best = layer_weight(), {"loss": torch.inf}
    learned = LearnedClipping(weight, spec)
    inputs, states = correlated_inputs(256, 64, seed=1), []

    def remember(step: int) -> None:
        loss = output_error(weight, learned.hard(), inputs)
        if loss < best["loss"]:
            best["loss"] = loss
            states[:] = [{name: value.clone() for name, value in learned.state_dict().items()}]

    train(learned, weight, inputs, steps=200, rate=1e-2, after=remember)
    learned.load_state_dict(states[0])
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.95 * nearest


def test_two_bits_gain_more_than_eight() -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    gains = []
    for bits in (2, 8):
        spec = WeightSpec("int", bits, None, symmetric=False)
        learned = LearnedClipping(weight, spec)
        train(learned, weight, inputs, steps=200, rate=2e-2)
        trained, nearest = errors_on_held_out(learned, weight, spec)
        gains.append(nearest / trained)
    assert gains[0] > 1.3 and gains[0] > gains[1]
    assert torch.isfinite(decode(learned.pack())).all()


@every_spec
def test_a_weight_that_stays_is_clipped_as_ever(spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    still, moving = LearnedClipping(weight, spec), MovingClipping(weight, spec, lambda w: w)
    assert torch.equal(moving(), still())
    assert torch.equal(decode(moving.pack()), decode(still.pack()))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("values", [{}, {"symmetric": False}, {"symmetric": False, "real_zero_point": True}], ids=str)
def test_gradients_of_a_moving_weight_are_those_of_its_size(bits: int, values: dict[str, Any]) -> None:
    """Q(c w) = c Q(w), so that its derivative at c = 1 is Q(w): rounding, clipping and the range together."""
    spec = WeightSpec("int", bits, 16, scale_dtype="float32", **values)
    factor = torch.ones((), requires_grad=True)
    moving = MovingClipping(gaussian(6, 48), spec, lambda w: w * factor, logit=1.0)
    outer = gaussian(6, 48, seed=3)
    result = moving()
    (result * outer).sum().backward()
    assert factor.grad is not None
    assert float(factor.grad) == pytest.approx(float((result.detach() * outer).sum()), rel=1e-3, abs=1e-3)


def test_what_is_packed_is_the_moved_weight() -> None:
    weight, spec = gaussian(6, 48), WeightSpec("int", 4, 16, symmetric=False)
    scale = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.5
    moving = MovingClipping(weight, spec, lambda w: w * scale)
    assert torch.equal(decode(moving.pack()), decode(LearnedClipping(weight * scale, spec).pack()))
    assert torch.equal(moving.hard(), moving().detach())
