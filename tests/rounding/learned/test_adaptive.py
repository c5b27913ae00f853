"""AdaRound and TesseraQ: the numbered tests of their method pages that concern one weight."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.formats.floating_point import floating_point
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.floating_point import round_floating_point
from hf_lowbit.rounding.learned import AdaptiveRounding
from hf_lowbit.rounding.learned.soft import rectified_sigmoid
from tests.rounding.learned.toy import (
    codes_of,
    correlated_inputs,
    errors_on_held_out,
    every_integer,
    every_spec,
    gaussian,
    layer_weight,
    output_error,
    train,
)

OTHERS = [WeightSpec("nf", 4, 16), WeightSpec("fp_e2m1", 4, 16, symmetric=False), WeightSpec("codebook", 3, None)]


# 1
@every_spec
def test_at_first_the_soft_weight_is_the_weight_within_the_grid(spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    learned = AdaptiveRounding(weight, spec)
    within = learned.ungrouped(learned.span) > 0
    assert within.float().mean() > 0.1
    assert torch.allclose(learned().detach()[within], weight[within], atol=1e-5)
    beyond = learned().detach()[~within]
    assert torch.equal(beyond, learned.hard()[~within])


def test_the_loss_rises_from_nothing_as_weights_harden() -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    spec = WeightSpec("int", 3, 16, symmetric=False)
    losses = train(AdaptiveRounding(weight, spec), weight, inputs, steps=300, rate=2e-2)
    nearest = output_error(weight, decode(round_to_nearest(weight, spec)), inputs)
    assert losses[0] < 0.1 * nearest  # of weights that a rounded zero point leaves beyond the grid
    assert losses[0] < losses[-1] < nearest


# 2
@pytest.mark.parametrize("spec", [WeightSpec("int", 4, 16), WeightSpec("int", 2, None, symmetric=False), *OTHERS])
def test_codes_are_one_of_the_two_neighbours(spec: WeightSpec) -> None:
    weight = layer_weight()
    learned = AdaptiveRounding(weight, spec)
    train(learned, weight, correlated_inputs(256, 64, seed=1), steps=200, rate=1e-2)
    index, _ = learned.final()
    raised = index - learned.below
    assert raised.min() == 0 and raised.max() == 1
    moved = (decode(learned.pack()) != decode(round_to_nearest(weight, spec))).float().mean()
    assert 0.02 < moved < 0.6


# 3
def test_of_two_equal_inputs_one_weight_is_rounded_up() -> None:
    spec = WeightSpec("int", 4, None, scale_dtype="float32")
    weight = torch.tensor([[7.5, 0.4, 0.4]])  # a step is 1: nearest rounds both down
    learned = AdaptiveRounding(weight, spec)
    shared = gaussian(64, 1, seed=2)
    inputs = torch.cat([0.01 * gaussian(64, 1, seed=3), shared, shared + 0.05 * gaussian(64, 1, seed=4)], 1)
    assert learned.hard()[0, 1:].tolist() == [0, 0]
    train(learned, weight, inputs, steps=600, rate=1e-2)
    assert sorted(learned.hard()[0, 1:].tolist()) == [0, 1]


# 4
def test_the_penalty_drives_h_to_its_ends() -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    ambiguous = []
    for strength in (0.0, 0.01):
        learned = AdaptiveRounding(weight, WeightSpec("int", 3, 16), regularization=strength)
        train(learned, weight, inputs, steps=500, rate=3e-2)
        h = rectified_sigmoid(learned.logits)[learned.span > 0]
        ambiguous.append(((h > 0.05) & (h < 0.95)).float().mean().item())
    assert ambiguous[0] > 0.5 and ambiguous[1] < 0.05


# 6
@pytest.mark.parametrize("learn_scale", [False, True])
@every_integer
def test_training_beats_round_to_nearest_on_held_out_inputs(spec: WeightSpec, learn_scale: bool) -> None:
    weight = layer_weight()
    learned = AdaptiveRounding(weight, spec, learn_scale=learn_scale)
    train(learned, weight, correlated_inputs(256, 64, seed=1), steps=300, rate=1e-2)
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.8 * nearest


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: spec.json)
def test_training_beats_round_to_nearest_in_other_formats(spec: WeightSpec) -> None:
    weight = layer_weight()
    learned = AdaptiveRounding(weight, spec)
    train(learned, weight, correlated_inputs(256, 64, seed=1), steps=300, rate=1e-2)
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.8 * nearest


# TesseraQ 4, 5, 8
def test_hardening_fixes_a_growing_share_of_weights() -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    spec = WeightSpec("int", 2, 16, symmetric=False)
    learned = AdaptiveRounding(weight, spec, regularization=0.0, learn_scale=True)
    hardened = torch.zeros_like(learned.logits, dtype=torch.bool)
    for soft in (0.75, 0.5, 0.25, 0.125, 0.06, 0.02, 0.0):
        learned.harden_(1 - soft)
        fixed = learned.logits.isinf()
        assert fixed.float().mean().item() == pytest.approx(1 - soft, abs=1e-3)
        assert fixed[hardened].all()
        hardened, before = fixed, learned.logits.detach().clone()
        train(learned, weight, inputs, steps=40, rate=2e-2)
        assert learned.logits.grad is not None and (learned.logits.grad[fixed] == 0).all()
        assert torch.equal(learned.logits[fixed], before[fixed])
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.8 * nearest
    assert learned.scale_logits is not None
    factor = 2 * learned.scale_logits.sigmoid()
    assert factor.min() > 0 and factor.max() < 2 and (factor != 1).any()


def test_codes_stay_within_the_bits() -> None:
    learned = AdaptiveRounding(gaussian(8, 48), WeightSpec("int", 2, 16))
    with torch.no_grad():
        learned.logits.fill_(5.0)
    assert codes_of(learned.pack()).max() <= 3


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(RoundingError, match="share"):
        AdaptiveRounding(gaussian(4, 32), WeightSpec()).harden_(share)


FLOATING = [WeightSpec(f"fp_{split}", 4, None) for split in ("e1m2", "e2m1", "e3m0")] + [WeightSpec("fp_e3m2", 6, 16)]
every_floating = pytest.mark.parametrize("spec", FLOATING, ids=lambda spec: spec.format)


# fp_diffusion, step 4
@every_floating
def test_on_a_floating_point_grid_the_neighbours_are_a_step_of_the_binade_apart(spec: WeightSpec) -> None:
    split = floating_point(spec.format)
    assert split is not None
    weight = gaussian(8, 64)
    packed = round_floating_point(weight, spec)
    learned = AdaptiveRounding(weight, spec, packed)
    scale = learned.base_scale.unsqueeze(-1)
    x = learned.weight / scale
    within = (x.abs() < split.limit) & (learned.span > 0)
    bias = 2 ** (split.exponent_bits - 1) - 1
    binade = torch.floor(torch.log2(x.abs()) + bias).clamp(min=1)
    step = torch.exp2(binade - split.mantissa_bits - bias)
    floor = torch.floor(x / step)
    assert torch.equal((floor * step)[within], learned.lower[within])
    assert torch.equal(step[within], learned.span[within])
    h = rectified_sigmoid(learned.logits.detach())
    assert torch.allclose(h[within], (x / step - floor)[within], atol=1e-4)
    assert torch.allclose(learned().detach().reshape(x.shape)[within], learned.weight[within], atol=1e-5)
    clip = split.limit * scale.expand_as(x)  # what lies beyond stays at its end
    beyond = x.abs() > split.limit
    assert beyond.any() and torch.equal(learned().detach().reshape(x.shape)[beyond].abs(), clip[beyond])


@every_floating
@pytest.mark.parametrize("scale_aware", [False, True])
def test_floating_point_roundings_are_decided_and_better_than_nearest(spec: WeightSpec, scale_aware: bool) -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    start = round_floating_point(weight, spec)
    learned = AdaptiveRounding(weight, spec, start, scale_aware=scale_aware)
    assert torch.allclose(learned.hard(), decode(start)), "before any step: the nearest"
    train(learned, weight, inputs, steps=500, rate=4e-2 if not scale_aware else 5e-3)
    up = learned.final()[0] - learned.below
    assert up.min() == 0 and up.max() == 1
    trained, nearest = output_error(weight, learned.hard(), inputs), output_error(weight, decode(start), inputs)
    assert trained < 0.8 * nearest
    h = rectified_sigmoid(learned._a().detach())[learned.span > 0]
    assert ((h < 1e-2) | (h > 1 - 1e-2)).float().mean() > 0.99
    assert torch.allclose(decode(learned.pack()), learned.hard())


def test_scale_aware_logits_move_by_the_rate_over_the_step() -> None:
    weight = gaussian(4, 32)
    start = round_floating_point(weight, WeightSpec("fp_e3m0", 4))
    learned = AdaptiveRounding(weight, start.spec, start, regularization=0.0, scale_aware=True)
    plain = AdaptiveRounding(weight, start.spec, start, regularization=0.0)
    assert torch.allclose(learned._a(), plain.logits, atol=1e-5)
    before = learned._a().detach().clone()
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-4)
    learned().square().sum().backward()
    optimizer.step()
    moved, step = (learned._a().detach() - before).abs(), learned.step
    assert step is not None
    reached = learned.logits.grad.abs() > 1e-5  # type: ignore[union-attr]
    assert torch.allclose((moved * step)[reached], torch.full_like(step, 1e-4)[reached], rtol=0.05)
    assert reached.any() and step[reached].max() > 4 * step[reached].min()
