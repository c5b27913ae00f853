"""A Hadamard transform of a packed layer's input: exact, stored in the plan alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec
from hf_lowbit.nn import Hadamard, LayerSpec, PackedLinear, PackedModule, TransformSpec

SPEC = WeightSpec(bits=8, symmetric=False)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 20)


@pytest.mark.parametrize(("order", "inner"), [(48, 1), (4, 12), (8, 2)])
def test_what_is_rotated_online_and_offline_cancels(pack: Any, order: int, inner: int) -> None:
    """Specification, test 5."""
    float_layer = layer()
    packed = pack(float_layer, LayerSpec(SPEC, transform=Hadamard(order, inner)))
    x = torch.randn(6, 48)
    expected = float_layer(x)
    assert (packed(x) - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(packed.to_float(torch.float32)(x), packed(x), rtol=1e-4, atol=1e-5)
    transform = Hadamard(order, inner)
    matrix = torch.randn(20, 48, dtype=torch.float64)
    torch.testing.assert_close(transform.folded(transform.weights(matrix, {}), {}), matrix)


def test_nothing_is_stored_and_the_plan_names_it(pack: Any) -> None:
    spec = LayerSpec(SPEC, transform=Hadamard(12, 4))
    packed = pack(layer(), spec)
    assert not any("transform" in name for name, _ in packed.named_parameters())
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    packed.check()


def test_one_large_channel_costs_less_at_four_bits(pack: Any) -> None:
    float_layer, x = layer(), torch.randn(32, 48)
    x[:, 5] *= 30
    float_layer.weight.data[:, 5] /= 30
    errors = []
    for transform in (None, Hadamard(48)):
        packed = pack(float_layer, LayerSpec(SPEC, ActivationSpec("int", 4), transform=transform))
        errors.append(float((packed(x) - float_layer(x)).norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    "values", [{"order": 6}, {"order": 1}, {"order": "4"}, {"order": True}, {"order": 4, "inner": 0}]
)
def test_impossible_parameters_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="hadamard"):
        TransformSpec.from_dict({"kind": "hadamard", **values})


def test_blocks_must_divide_the_input() -> None:
    packed: PackedModule = PackedLinear.from_float(layer(), LayerSpec(SPEC))
    with pytest.raises(SpecError, match="blocks of 32 x 1 channels do not divide 48"):
        packed.set_transform(Hadamard(32))
