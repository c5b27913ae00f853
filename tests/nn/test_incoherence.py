"""Layers with incoherence processing: the same function, little stored, and exact in whatever way they are called."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec, decode
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.nn import KINDS, CorruptWeightError, Incoherence, LayerSpec, PackedLinear, TransformSpec, kind_of
from hf_lowbit.nn.transforms import incoherence
from hf_lowbit.plan import Plan, PlanError, PlannedLayer
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import pack_parameter
from hf_lowbit.transforms.butterfly import draw_butterfly, rotate
from hf_lowbit.transforms.incoherence import balancing_scale

COLUMNS, ROWS = 48, 24
SPEC = LayerSpec(WeightSpec(bits=8))
KIND = Incoherence(5)


def inputs(tokens: int = 12) -> Tensor:
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(3))
    x[:, 5] *= 40
    return x


def tensors_of(weight: Tensor) -> dict[str, Tensor]:
    x = inputs(100)
    return {"scale": to_bits(balancing_scale(weight, x.t() @ x), "bfloat16")}


def incoherent(module: nn.Module, spec: LayerSpec = SPEC) -> PackedLinear:
    packed = KINDS[str(kind_of(module))].from_float(module, spec)
    assert isinstance(packed, PackedLinear)
    weight = packed.weight.detach()
    packed.set_transform(KIND, tensors_of(packed.arranged(weight)))
    codes = round_to_nearest(packed.to_matrix("weight", weight), spec.weight)
    pack_parameter(packed, "weight", weight, codes, "layer")
    return packed.eval()


def float_layer(kind: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(COLUMNS, ROWS) if kind == "linear" else Conv1D(ROWS, COLUMNS)


@pytest.mark.parametrize("kind", ["linear", "transformers_conv1d"])
@torch.no_grad()
def test_the_layer_computes_what_the_float_layer_did(kind: str) -> None:
    layer = float_layer(kind)
    expected = layer(inputs())
    assert float((incoherent(layer)(inputs()) - expected).norm() / expected.norm()) < 0.01


@torch.no_grad()
def test_rewritten_weights_with_rewritten_inputs_are_the_same_product() -> None:
    """Tests 2 and 3 of the method page: exact without rounding, and tr(W H W^T) as it was."""
    weight, x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(8)), inputs(100)
    tensors = tensors_of(weight)
    mixed, y = KIND.weights(weight, tensors), KIND.inputs(x, tensors)
    torch.testing.assert_close(KIND.outputs(y @ mixed.t(), tensors), x @ weight.t(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(KIND.folded(mixed, tensors), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(KIND.weights(KIND.folded(mixed, tensors), tensors), mixed, rtol=1e-4, atol=1e-5)
    h, mixed_h = x.t() @ x, y.t() @ y
    moved = KIND.inputs(KIND.inputs(h, tensors).t(), tensors)
    torch.testing.assert_close(moved, mixed_h, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close((mixed @ mixed_h * mixed).sum(), (weight @ h * weight).sum(), rtol=1e-4, atol=0)


@torch.no_grad()
def test_it_is_u_w_d_v() -> None:
    weight = torch.randn(ROWS, COLUMNS)
    tensors = tensors_of(weight)
    d = tensors["scale"].view(torch.bfloat16).float()
    v, u = (rotate(torch.eye(n), draw_butterfly(n, 5, side)).t() for n, side in ((COLUMNS, 0), (ROWS, 1)))
    torch.testing.assert_close(KIND.weights(weight, tensors), u @ (weight * d) @ v.t(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_both_sides_of_a_square_layer_rotate_differently() -> None:
    """With one rotation for both the identity would stay the identity."""
    tensors = {"scale": to_bits(torch.ones(COLUMNS), "bfloat16")}
    assert float(KIND.weights(torch.eye(COLUMNS), tensors).abs().max()) < 0.9


@pytest.mark.parametrize("kind", ["linear", "transformers_conv1d"])
@pytest.mark.parametrize("low_rank", [0, 3])
@torch.no_grad()
def test_folding_back_gives_an_ordinary_layer_of_the_same_function(kind: str, low_rank: int) -> None:
    packed = incoherent(float_layer(kind), replace(SPEC, low_rank=low_rank))
    ordinary = packed.to_float(torch.float32)
    assert type(ordinary) is type(float_layer(kind))
    torch.testing.assert_close(ordinary(inputs()), packed(inputs()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inputs_are_quantized_after_the_rotation() -> None:
    """An outlier channel no longer takes the range of its token."""
    linear, activation = float_layer(), ActivationSpec(bits=4)
    packed = incoherent(linear, replace(SPEC, activation=activation))
    codes, scale, _ = quantize_tokens(packed.transformed(inputs()), activation)
    weight = decode(round_to_nearest(packed.to_matrix("weight", linear.weight), SPEC.weight))
    expected = KIND.outputs(F.linear(codes.float() * scale, weight), packed.transform_tensors()) + linear.bias
    torch.testing.assert_close(packed(inputs()), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input_even_after_inference_mode() -> None:
    """Rotations are kept from whichever call draws them first."""
    packed = incoherent(float_layer())
    incoherence._butterfly.cache_clear()
    with torch.inference_mode():
        packed(inputs())
    x, reference = (inputs().requires_grad_() for _ in range(2))
    packed(x).square().sum().backward()
    packed.to_float(torch.float32)(reference).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_half_types_keep_their_type_and_autocast_changes_nothing() -> None:
    packed = incoherent(float_layer())
    exact = packed(inputs())
    for dtype in (torch.bfloat16, torch.float16):
        y = packed(inputs().to(dtype))
        assert y.dtype == dtype and float((y.float() - exact).norm() / exact.norm()) < 0.02
    tensors = packed.transform_tensors()
    with torch.autocast("cpu", torch.bfloat16):
        inside = KIND.inputs(inputs(), tensors)
    assert torch.equal(inside, KIND.inputs(inputs(), tensors))


@torch.no_grad()
def test_copies_and_exported_graphs_compute_the_same() -> None:
    packed = incoherent(float_layer())
    expected = packed(inputs())
    assert torch.equal(copy.deepcopy(packed)(inputs()), expected)
    incoherence._butterfly.cache_clear()
    exported = torch.export.export(packed, (inputs(),)).module()
    torch.testing.assert_close(exported(inputs()), expected)
    assert torch.equal(packed(inputs()), expected)  # nothing of the trace was kept


def test_compiled_layers_compute_and_learn_the_same() -> None:
    packed = incoherent(float_layer())
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    x, reference = (inputs().requires_grad_() for _ in range(2))
    y, expected = compiled(x), packed(reference)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-4)  # outputs reach 17


def test_sixteen_bits_for_each_input_are_stored() -> None:
    packed = incoherent(float_layer())
    stored = {name: tensor for name, tensor in packed.state_dict().items() if "transform" in name}
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "weight_transform_scale": ((COLUMNS,), torch.int16)
    }


def test_layers_of_a_width_share_their_rotations() -> None:
    incoherence._butterfly.cache_clear()
    for _ in range(3):
        incoherent(float_layer())(inputs())
    assert incoherence._butterfly.cache_info().misses == 2, "V of the inputs and U of the outputs"


def test_widths_without_small_factors_are_refused() -> None:
    for rows, columns, what in ((1031, 64, "1031 outputs"), (64, 2 * 1031, "2062 inputs")):
        with pytest.raises(SpecError, match=f"{what} have no two factors up to 1024"):
            KIND.companions(rows, columns)
    assert KIND.companions(1021, 4099 - 3) == {"scale": ((4096,), torch.int16)}


def test_specs_round_trip_as_plain_data() -> None:
    spec = replace(SPEC, transform=KIND)
    stored = json.loads(json.dumps(spec.to_dict()))
    assert stored["transform"] == {"kind": "incoherence", "seed": 5}
    assert LayerSpec.from_dict(stored) == spec
    plan = Plan({"a.q": PlannedLayer("linear", spec)})
    assert Plan.from_list(plan.to_list(), ["a", "a.q"]).layers == plan.layers


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "0", None])
def test_seeds_that_cannot_be_are_refused(seed: Any) -> None:
    with pytest.raises(SpecError, match="seed must be an integer from 0"):
        TransformSpec.from_dict({"kind": "incoherence", "seed": seed})
    entry = {"kind": "linear", **SPEC.to_dict(), "transform": {"kind": "incoherence", "seed": seed}, "modules": ["a"]}
    with pytest.raises(PlanError, match="seed must be an integer from 0"):
        Plan.from_list([entry], ["a"])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_damaged_scales_are_found(value: float) -> None:
    packed = incoherent(float_layer())
    packed.check()
    packed.weight_transform_scale[3] = to_bits(torch.tensor([value]), "bfloat16")[0]
    with pytest.raises(CorruptWeightError, match="scale must be positive and finite"):
        packed.check()
