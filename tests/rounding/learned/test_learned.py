"""What every kind of learned weight promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.learned import (
    AdaptiveRounding,
    LearnedClipping,
    LearnedWeight,
    SignRounding,
    WholeSpaceRounding,
)
from tests.rounding.learned.toy import SPECS, codes_of, correlated_inputs, every_spec, gaussian, train

Kind = Callable[..., LearnedWeight]
KINDS: list[Kind] = [SignRounding, LearnedClipping, AdaptiveRounding, WholeSpaceRounding]
every_kind = pytest.mark.parametrize("kind", KINDS)
POWER = WeightSpec("power", 4, 16, exponent=0.6)


def allowed(kind: Kind, spec: WeightSpec) -> bool:
    return kind is not WholeSpaceRounding or (spec.format == "power" and spec.symmetric)


every_pair = pytest.mark.parametrize(
    ("kind", "spec"),
    [(kind, spec) for kind in KINDS for spec in SPECS if allowed(kind, spec)],
    ids=lambda value: value.json if isinstance(value, WeightSpec) else value.__name__,
)


def stir(learned: LearnedWeight, amount: float = 0.3) -> None:
    """Parameters as training might leave them."""
    with torch.no_grad():
        for seed, parameter in enumerate(learned.parameters()):
            parameter += amount * gaussian(*parameter.shape, seed=seed + 50)
    learned.constrain_()


@every_pair
def test_the_packed_weight_is_the_hard_weight(kind: Kind, spec: WeightSpec) -> None:
    learned = kind(gaussian(6, 48), spec)
    for _ in range(2):
        packed = learned.pack()
        assert torch.equal(decode(packed), learned.hard())
        assert {s: (tuple(t.shape), t.dtype) for s, t in packed.tensors().items()} == spec.companions((6,), 48)
        stir(learned)


@pytest.mark.parametrize("kind", [SignRounding, LearnedClipping])
@every_spec
def test_what_is_rounded_in_forward_is_what_is_packed(kind: Kind, spec: WeightSpec) -> None:
    learned = kind(gaussian(6, 48), spec)
    stir(learned)
    assert torch.equal(decode(learned.pack()), learned().detach())


@every_spec
def test_soft_rounding_becomes_what_is_packed(spec: WeightSpec) -> None:
    learned = AdaptiveRounding(gaussian(6, 48), spec, learn_scale=True)
    stir(learned)
    learned.harden_(1.0)
    assert torch.allclose(decode(learned.pack()), learned().detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("group_size", [None, 16, "tensor"])
def test_whole_space_rounding_becomes_what_is_packed(group_size: int | None) -> None:
    learned = WholeSpaceRounding(gaussian(6, 48), replace(POWER, group_size=group_size))
    stir(learned)
    with torch.no_grad():
        learned.codes.round_()
    assert torch.allclose(decode(learned.pack()), learned().detach(), rtol=1e-6, atol=1e-7)
    assert learned.pack().spec.exponent == pytest.approx(learned.exponent.item()) != POWER.exponent


@pytest.mark.parametrize(
    "make",
    [SignRounding, AdaptiveRounding, lambda weight, spec: LearnedClipping(weight, spec, logit=torch.inf)],
    ids=["sign", "adaptive", "clipping"],
)
@every_spec
def test_without_training_it_is_round_to_nearest(make: Kind, spec: WeightSpec) -> None:
    """AdaRound's test 5, OmniQuant's test 1."""
    weight = gaussian(6, 48)
    assert torch.equal(decode(make(weight, spec).pack()), decode(round_to_nearest(weight, spec)))


@every_pair
def test_the_start_s_grid_is_kept(kind: Kind, spec: WeightSpec) -> None:
    weight = gaussian(6, 48)
    start = round_to_nearest(weight * 0.8, spec)  # another grid than the weight's own
    options = {"logit": torch.inf} if kind is LearnedClipping else {}
    learned = kind(weight, spec, start, **options).pack()
    assert torch.equal(learned.scale, start.scale)
    assert (learned.zero_point is None) == (start.zero_point is None)
    if learned.zero_point is not None and start.zero_point is not None:
        if spec.has_integer_zero_point:
            assert torch.equal(learned.zero_point, start.zero_point)
        else:  # bit patterns of one that was computed again
            unit_in_last_place = (learned.zero_point.int() - start.zero_point.int()).abs()
            assert unit_in_last_place.max() <= 1


@every_kind
def test_the_weight_never_changes_and_training_is_deterministic(kind: Kind) -> None:
    weight, inputs = gaussian(8, 48), correlated_inputs(64, 48, seed=1)
    results: list[PackedTensor] = []
    for _ in range(2):
        learned = kind(weight, POWER)
        before = learned.weight.clone()
        train(learned, weight, inputs, steps=20, rate=1e-2)
        assert torch.equal(learned.weight, before)
        results.append(learned.pack())
    first, second = results
    assert first.spec == second.spec
    assert all(torch.equal(tensor, second.tensors()[suffix]) for suffix, tensor in first.tensors().items())


@every_kind
def test_every_parameter_is_in_a_group_once_and_learns(kind: Kind) -> None:
    spec = POWER if kind is WholeSpaceRounding else WeightSpec("int", 3, 16, symmetric=False)
    weight = gaussian(8, 48)
    learned = kind(weight, spec, **({"learn_scale": True} if kind is AdaptiveRounding else {}))
    grouped = [parameter for group in learned.parameter_groups() for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in learned.parameters()} and len(grouped) == len(set(grouped))
    before = [parameter.detach().clone() for parameter in grouped]
    train(learned, weight, correlated_inputs(64, 48, seed=1), steps=3, rate=1e-2)
    assert all(not torch.equal(old, new) for old, new in zip(before, grouped, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_read_as_float32(kind: Kind, dtype: torch.dtype) -> None:
    weight = gaussian(4, 32).to(dtype)
    learned = kind(weight, POWER)
    assert learned().dtype == torch.float32
    assert torch.equal(learned.hard(), kind(weight.float(), POWER).hard())


@every_kind
def test_a_group_of_zeros_stays_zero(kind: Kind) -> None:
    weight = gaussian(4, 32)
    weight[1, :16] = 0
    learned = kind(weight, POWER)
    train(learned, weight, correlated_inputs(64, 32, seed=1), steps=5, rate=1e-2)
    assert torch.isfinite(learned()).all() and (decode(learned.pack())[1, :16] == 0).all()


# refusals
@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("with_start", [False, True])
def test_weights_that_are_not_finite_are_refused(kind: Kind, bad: float, with_start: bool) -> None:
    weight = gaussian(4, 32)
    start = round_to_nearest(weight, POWER) if with_start else None
    weight[2, 7] = bad
    with pytest.raises(RoundingError, match="NaN or infinite"):
        kind(weight, POWER, start)


@every_kind
def test_parameters_that_diverged_are_refused(kind: Kind) -> None:
    learned = kind(gaussian(4, 32), POWER)
    with torch.no_grad():
        next(learned.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(RoundingError, match="lower the learning rate"):
        learned.pack()


@every_kind
def test_a_start_of_another_spec_or_shape_is_refused(kind: Kind) -> None:
    weight = gaussian(4, 32)
    for start in (round_to_nearest(weight, replace(POWER, group_size=None)), round_to_nearest(weight[:2], POWER)):
        with pytest.raises(RoundingError, match="start must be this weight"):
            kind(weight, POWER, start)


@every_kind
def test_stacks_are_refused(kind: Kind) -> None:
    with pytest.raises(RoundingError, match="one matrix at a time"):
        kind(gaussian(2, 4, 32), POWER)


def test_a_start_with_a_fitted_codebook_brings_its_table() -> None:
    weight, spec = gaussian(6, 48), WeightSpec("codebook", 3, 16)
    start = round_to_nearest(gaussian(6, 48, seed=3), spec)
    packed = SignRounding(weight, spec, start).pack()
    table: Tensor | None = packed.table
    assert table is not None and start.table is not None and torch.equal(table, start.table)
    assert codes_of(packed).max() < 8
