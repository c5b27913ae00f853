"""Layers with a transform: stored with the plan, exact, and alone in what they compute."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_lowbit
from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec, decode
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.nn import (
    KINDS,
    CorruptWeightError,
    LayerSpec,
    PackedLinear,
    Reassembly,
    TransformSpec,
    connect_siblings,
    kind_of,
    register_transform,
)
from hf_lowbit.plan import Plan, PlanError, PlannedLayer
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import pack_parameter
from hf_lowbit.transforms.reassembly import assign, pair_errors, split_counts

CHANNELS, ROWS = 32, 24
SPEC = LayerSpec(WeightSpec(bits=8, symmetric=False))


def inputs(tokens: int = 12) -> Tensor:
    torch.manual_seed(3)
    x = torch.randn(tokens, CHANNELS)
    x[:, 5] *= 40
    return x


def transform_of(weight: Tensor) -> tuple[Reassembly, dict[str, Tensor]]:
    x = inputs()
    assignment = assign(split_counts(x.abs().amax(0), 25.0), pair_errors(x.t() @ x, weight.t() @ weight))
    return Reassembly(len(assignment.source)), {
        **assignment._asdict(),
        "factor": assignment.factor.view(torch.int32),
    }


def reassembled(module: nn.Module, spec: LayerSpec = SPEC) -> PackedLinear:
    """A packed layer with a transform, as calibration makes it; the float module stays as it is."""
    packed = KINDS[str(kind_of(module))].from_float(module, spec)
    assert isinstance(packed, PackedLinear)
    packed.set_transform(*transform_of(packed.arranged(packed.weight.detach())))
    weight = packed.weight.detach()
    codes = round_to_nearest(packed.to_matrix("weight", weight), spec.weight)
    pack_parameter(packed, "weight", weight, codes, "layer")
    return packed.eval()


def float_layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(CHANNELS, ROWS) if kind == "linear" else Conv1D(ROWS, CHANNELS)


@pytest.mark.parametrize("kind", ["linear", "transformers_conv1d"])
@pytest.mark.parametrize("low_rank", [0, 3])
@torch.no_grad()
def test_folding_back_gives_an_ordinary_layer_of_the_same_function(kind: str, low_rank: int) -> None:
    packed = reassembled(float_layer(kind), replace(SPEC, low_rank=low_rank))
    ordinary = packed.to_float(torch.float32)
    assert type(ordinary) is type(float_layer(kind))
    torch.testing.assert_close(ordinary(inputs()), packed(inputs()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_low_rank_branch_repairs_the_rewritten_weight() -> None:
    """It reads the transformed input: with full rank nothing but merging is left of the error."""
    linear = nn.Linear(CHANNELS, ROWS)
    spec = LayerSpec(WeightSpec(bits=2), low_rank=ROWS)
    packed = reassembled(linear, spec)
    rewritten = packed.to_matrix("weight", linear.weight)
    expected = F.linear(packed.transformed(inputs()), rewritten, linear.bias)
    assert float((packed(inputs()) - expected).norm() / expected.norm()) < 0.01


@torch.no_grad()
def test_the_transform_comes_before_the_input_is_quantized() -> None:
    linear, activation = nn.Linear(CHANNELS, ROWS), ActivationSpec(bits=4)
    packed = reassembled(linear, replace(SPEC, activation=activation))
    codes, scale, _ = quantize_tokens(packed.transformed(inputs()), activation)
    rewritten = round_to_nearest(packed.to_matrix("weight", linear.weight), SPEC.weight)
    expected = F.linear(codes.float() * scale, decode(rewritten), linear.bias)
    torch.testing.assert_close(packed(inputs()), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input() -> None:
    packed = reassembled(float_layer("linear"))
    x = inputs().requires_grad_()
    packed(x).square().sum().backward()
    reference = inputs().requires_grad_()
    packed.to_float(torch.float32)(reference).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_rewriting_a_folded_weight_gives_the_rewritten_one_back() -> None:
    """What merging an adapter relies on."""
    packed = reassembled(float_layer("linear"))
    rewritten = packed.to_matrix("weight", fresh())
    torch.testing.assert_close(packed.to_matrix("weight", packed.from_matrix("weight", rewritten)), rewritten)


def fresh() -> Tensor:
    return torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_half_precision_inputs_keep_their_type() -> None:
    packed = reassembled(float_layer("linear"))
    exact = packed(inputs())
    for dtype in (torch.bfloat16, torch.float16):
        y = packed(inputs().to(dtype))
        assert y.dtype == dtype
        assert float((y.float() - exact).norm() / exact.norm()) < 0.02


@torch.no_grad()
def test_layers_with_a_transform_have_no_siblings() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (reassembled(nn.Linear(CHANNELS, ROWS)) for _ in range(3))

    attention = Attention()
    assert connect_siblings(attention) == 0
    for name in ("q_proj", "k_proj", "v_proj"):
        assert getattr(attention, name).siblings is None


def test_layers_of_one_input_hold_equal_tensors_of_their_own() -> None:
    transform, tensors = transform_of(fresh())
    layers = [PackedLinear.from_float(nn.Linear(CHANNELS, ROWS), SPEC) for _ in range(2)]
    for layer in layers:
        layer.set_transform(transform, tensors)
    for part in ("source", "target", "factor"):
        a, b = (getattr(layer, f"weight_transform_{part}") for layer in layers)
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not a.is_floating_point()


def test_a_transform_can_be_changed_and_taken_away_before_packing() -> None:
    layer = PackedLinear.from_float(nn.Linear(CHANNELS, ROWS), SPEC)
    names = set(layer.state_dict())
    layer.set_transform(*transform_of(fresh()))
    assert set(layer.state_dict()) - names == {f"weight_transform_{part}" for part in ("source", "target", "factor")}
    layer.set_transform(None)
    assert set(layer.state_dict()) == names and layer.layer_spec == SPEC
    assert torch.equal(layer.to_matrix("weight", layer.weight), layer.weight)


def test_tensors_of_other_shapes_are_refused() -> None:
    transform, tensors = transform_of(fresh())
    layer = PackedLinear.from_float(nn.Linear(CHANNELS, ROWS), SPEC)
    with pytest.raises(ValueError, match="has the tensors"):
        layer.set_transform(Reassembly(transform.entries + 1), tensors)
    with pytest.raises(ValueError, match="has the tensors"):
        layer.set_transform(transform, {**tensors, "factor": tensors["factor"].view(torch.float32)})
    with pytest.raises(SpecError, match="cannot cover"):
        layer.set_transform(Reassembly(CHANNELS - 1), tensors)


def test_specs_round_trip_as_plain_data() -> None:
    spec = replace(SPEC, transform=Reassembly(40), activation=ActivationSpec(bits=4))
    stored = json.loads(json.dumps(spec.to_dict()))
    assert stored["transform"] == {"kind": "reassembly", "entries": 40}
    assert LayerSpec.from_dict(stored) == spec
    assert "transform" not in SPEC.to_dict()
    plan = Plan({"a.q": PlannedLayer("linear", spec), "a.k": PlannedLayer("linear", SPEC)})
    assert Plan.from_list(plan.to_list(), ["a", "a.q", "a.k"]).layers == plan.layers


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"kind": "os.system", "entries": 40}, "unknown kind of transform"),
        ({"entries": 40}, "unknown kind of transform"),
        ("reassembly", "an object with a kind"),
        ({"kind": "reassembly"}, "other parameters"),
        ({"kind": "reassembly", "entries": 40, "path": "x"}, "other parameters"),
        ({"kind": "reassembly", "entries": "40"}, "positive integer"),
        ({"kind": "reassembly", "entries": 0}, "positive integer"),
    ],
)
def test_stored_transforms_that_cannot_be_are_refused(stored: Any, message: str) -> None:
    entry = {"kind": "linear", **SPEC.to_dict(), "transform": stored, "modules": ["a"]}
    with pytest.raises(PlanError, match=message):
        Plan.from_list([entry], ["a"])


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "embedding", "experts"])
def test_other_kinds_of_layers_are_refused(kind: str) -> None:
    entry = {"kind": kind, **replace(SPEC, transform=Reassembly(40)).to_dict(), "modules": ["a"]}
    with pytest.raises(PlanError, match="cannot have a transform"):
        Plan.from_list([entry], ["a"])
    if kind == "embedding":
        packed = KINDS[kind].from_float(nn.Embedding(8, 16), SPEC)
        with pytest.raises(SpecError, match="cannot have a transform"):
            packed.set_transform(*transform_of(fresh()))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("source", CHANNELS, "names channels outside"),
        ("target", -1, "names channels outside"),
        ("source", 0, "leaves channels out|factor is not"),
        ("factor", 0x7FC00000, "factor is not"),
    ],
)
def test_damaged_tensors_are_found(part: str, value: int, message: str) -> None:
    packed = reassembled(float_layer("linear"))
    packed.check()
    getattr(packed, f"weight_transform_{part}")[3] = value
    with pytest.raises(CorruptWeightError, match=message):
        packed.check()


def test_a_kinds_name_is_taken_once() -> None:
    class Other(Reassembly):
        kind = "reassembly"

    assert register_transform(Reassembly) is Reassembly
    with pytest.raises(ValueError, match="already registered"):
        register_transform(Other)
    assert TransformSpec.from_dict({"kind": "reassembly", "entries": 40}) == Reassembly(40)


@torch.no_grad()
def test_copies_and_traces_compute_the_same() -> None:
    packed = reassembled(float_layer("linear"))
    expected = packed(inputs())
    assert torch.equal(copy.deepcopy(packed)(inputs()), expected)
    exported = torch.export.export(packed, (inputs(),)).module()
    torch.testing.assert_close(exported(inputs()), expected)


@torch.no_grad()
def test_a_model_saves_and_reloads_bit_equal_in_shards(tmp_path: Path) -> None:
    from tests.matrix.models import MODELS, fingerprint

    torch.manual_seed(0)
    model = MODELS["llama"].build().eval()
    model.model.layers[0].input_layernorm.weight[7] = 40.0
    batch = MODELS["llama"].inputs(torch.float32)
    hf_lowbit.quantize(model, hf_lowbit.QLLMConfig(dataset=[batch] * 2, num_samples=2, epochs=0))
    layer = model.model.layers[0].self_attn
    assert isinstance(layer.q_proj.layer_spec.transform, Reassembly)
    assert layer.q_proj.layer_spec.transform == layer.k_proj.layer_spec.transform
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["plan"]
    assert any(entry.get("transform", {}).get("kind") == "reassembly" for entry in stored)
