"""NUPES: tests 6 and 7 of its method page on a layer (the gradients themselves are in test_functions.py)."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.formats.packed import scales
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.learned import WholeSpaceRounding
from tests.rounding.learned.toy import (
    codes_of,
    correlated_inputs,
    errors_on_held_out,
    gaussian,
    layer_weight,
    output_error,
    train,
)

SPECS = [WeightSpec("power", bits, g, exponent=0.7) for bits in (2, 3, 4) for g in (None, 16)]
every_power = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.json)


@every_power
def test_before_training_it_rounds_to_nearest_and_softly_is_the_weight(spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    learned = WholeSpaceRounding(weight, spec)
    nearest = round_to_nearest(weight, spec)
    assert torch.allclose(learned.hard(), decode(nearest), atol=1e-5)
    step = decode(nearest).abs().max()
    assert (learned().detach() - weight).abs().max() < 0.1 * step
    assert learned.pack().spec.exponent == pytest.approx(0.7, abs=1e-6)


# 6
def test_gradients_are_finite_with_zeros_among_the_codes() -> None:
    weight = gaussian(6, 48)
    weight[:, ::3] = 0
    learned = WholeSpaceRounding(weight, SPECS[-1])
    learned().square().sum().backward()
    for parameter in learned.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


# 7
@every_power
def test_codes_cross_several_integers_and_the_error_falls(spec: WeightSpec) -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    learned = WholeSpaceRounding(weight, spec, regularization=0.1)
    first, _ = learned.final()
    before = output_error(weight, learned.hard(), inputs)
    train(learned, weight, inputs, steps=400, rate=5e-2)
    last, _ = learned.final()
    assert output_error(weight, learned.hard(), inputs) < 0.8 * before
    if spec.bits > 2:  # two bits have three codes
        assert ((last - first).abs() > 1).any()
    trained, nearest = errors_on_held_out(learned, weight, spec)
    assert trained < 0.8 * nearest
    exponent = learned.pack().spec.exponent
    assert exponent is not None and 0.2 < exponent < 1
    if spec.bits > 2:  # the values of two bits are -1, 0 and 1 whatever the exponent
        assert exponent != pytest.approx(0.7, abs=5e-3)


def test_learned_scales_lower_the_error_and_are_what_is_stored() -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    errors = []
    for learn_scale in (False, True):
        learned = WholeSpaceRounding(weight, SPECS[-1], regularization=0.1, learn_scale=learn_scale)
        train(learned, weight, inputs, steps=400, rate=2e-2)
        errors.append(output_error(weight, learned.hard(), inputs))
    assert errors[1] < errors[0]
    assert not torch.equal(scales(learned.pack()), learned.base_scale)
    assert torch.equal(decode(learned.pack()), learned.hard())


def test_annealing_makes_soft_rounding_hard() -> None:
    weight, inputs = layer_weight(), correlated_inputs(256, 64, seed=1)
    learned = WholeSpaceRounding(weight, SPECS[-1], regularization=0.1)
    soft_at_first = (learned().detach() - learned.hard()).abs().mean()
    train(learned, weight, inputs, steps=400, rate=2e-2)
    learned.anneal_(1.0)
    assert (learned().detach() - learned.hard()).abs().mean() < 0.05 * soft_at_first


def test_a_start_s_codes_are_kept() -> None:
    spec = SPECS[-1]
    weight = gaussian(6, 48)
    start = round_to_nearest(weight + 0.3 * gaussian(6, 48, seed=1), spec)
    learned = WholeSpaceRounding(weight, spec, start)
    assert torch.allclose(learned.hard(), decode(start), atol=1e-5)
    assert not torch.equal(codes_of(start), codes_of(round_to_nearest(weight, spec)))


@pytest.mark.parametrize("exponent", [0.2, 1.0])
def test_exponents_at_the_ends_start_just_inside(exponent: float) -> None:
    learned = WholeSpaceRounding(gaussian(6, 48), WeightSpec("power", 4, exponent=exponent))
    learned().square().sum().backward()
    assert learned.exponent.item() == pytest.approx(exponent, abs=0.006)
    assert learned.exponent_logit.grad is not None and learned.exponent_logit.grad.abs() > 0


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (WeightSpec("int", 4), "needs format 'power'"),
        (WeightSpec("power", 4, symmetric=False, exponent=0.5), "symmetric=True"),
        (WeightSpec("power", 4), "search one first"),
        (WeightSpec("power", 4, exponent=1.2), "exponents from 0.2 to 1.0"),
    ],
)
def test_other_specs_are_refused(spec: WeightSpec, match: str) -> None:
    with pytest.raises(RoundingError, match=match):
        WholeSpaceRounding(gaussian(4, 32), spec)
