"""Re-based rounding: it starts at the packed weight, stays on its grid, and has gradients."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.formats.packed import scales
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.learned import AdaptiveRounding, RebasedRounding
from hf_lowbit.rounding.store import round_with
from tests.rounding.learned.toy import correlated_inputs, gaussian, layer_weight, output_error, train

SPECS = [
    WeightSpec("int", 4, None, symmetric=False),
    WeightSpec("int", 4, 16),
    WeightSpec("int", 2, 16, symmetric=False),
    WeightSpec("nf", 4, 16),
    WeightSpec("int", 4, "tensor"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.json)


@every_spec
def test_the_start_is_the_packed_weight_to_the_last_code(spec: WeightSpec) -> None:
    packed = round_with(fit_clipped, gaussian(6, 48), spec)  # clipped: some weights lie beyond the grid
    learned = RebasedRounding(packed)
    assert torch.equal(learned(), decode(packed))
    again = learned.pack().tensors()
    assert all(torch.equal(tensor, again[name]) for name, tensor in packed.tensors().items())


# 4
@every_spec
def test_what_is_trained_lies_on_the_same_grid(spec: WeightSpec) -> None:
    packed = round_with(fit_clipped, gaussian(6, 48), spec)
    learned = RebasedRounding(packed)
    with torch.no_grad():
        learned.values += scales(packed).mean() * gaussian(*learned.values.shape, seed=3)
    result = learned.pack()
    assert torch.equal(decode(result), learned()) and torch.equal(learned(), learned.hard())
    assert not torch.equal(result.weight, packed.weight)
    same = [name for name in packed.tensors() if name]
    assert all(torch.equal(packed.tensors()[name], result.tensors()[name]) for name in same)


# 5
def test_gradients_pass_within_the_grid_and_end_beyond_it() -> None:
    packed = round_to_nearest(gaussian(6, 48), SPECS[0])
    learned, outer = RebasedRounding(packed), gaussian(6, 48, seed=5)
    with torch.no_grad():
        learned.values[0] += 100
    (learned() * outer).sum().backward()
    assert learned.values.grad is not None
    assert torch.equal(learned.values.grad.reshape(6, 48)[1:], outer[1:]) and not learned.values.grad[0].any()


def test_codes_may_leave_the_two_that_adaround_chose_from() -> None:
    weight = gaussian(6, 48)
    rounded = AdaptiveRounding(weight, SPECS[0]).pack()
    learned = RebasedRounding(rounded)
    with torch.no_grad():
        learned.values += 2.2 * scales(rounded).unsqueeze(-1)
    moved = learned.final()[0] - RebasedRounding(rounded).final()[0]
    assert moved.max() == 2 and set(moved.unique().tolist()) <= {0, 1, 2}, "less than two only at the grid's end"


def test_training_lowers_the_error_of_rounded_weights() -> None:
    """Adam's steps are as large for all weights, and many reach the next code together: the best counts."""
    spec, weight, x = WeightSpec("int", 3, None, symmetric=False), layer_weight(), correlated_inputs(256, 64, seed=1)
    learned = RebasedRounding(round_to_nearest(weight, spec))
    found: list[torch.Tensor] = []
    losses = train(learned, weight, x, steps=600, rate=2e-4, after=lambda step: found.append(learned.hard()))
    best = found[min(range(len(losses)), key=losses.__getitem__) - 1]  # what the step before has made
    held_out = correlated_inputs(1024, 64, seed=7)
    assert output_error(weight, best, held_out) < 0.95 * output_error(
        weight, decode(round_to_nearest(weight, spec)), held_out
    )
