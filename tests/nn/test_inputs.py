"""Static inputs of packed modules: the stored scale, its checks, and products that read it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels import packed_linear, quantize_tokens, restore_tokens
from hf_lowbit.nn import CorruptWeightError, LayerSpec, PackedModule, connect_siblings
from tests.matrix.models import MODELS

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
STATIC = LayerSpec(WeightSpec(bits=4, group_size=16), ActivationSpec("int", 8, static=True))
SCALE = torch.tensor(0.02)


def experts() -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = MODELS["qwen3_moe"].build().model.layers[0].mlp.experts
    return module


def test_it_is_a_companion_that_no_cast_changes(pack: Pack) -> None:
    layer = pack(nn.Linear(32, 8), STATIC)
    assert layer.companion_shapes("weight")["weight_input_scale"] == ((1,), torch.int32)
    layer.set_input_scale("weight", SCALE)
    layer.half().to(torch.bfloat16)
    stored = layer.input_scale()
    assert stored is not None and stored.dtype == torch.float32 and torch.equal(stored, SCALE.reshape(1))
    assert "weight_input_scale" in layer.state_dict()
    assert not pack(nn.Linear(32, 8), LayerSpec(STATIC.weight, ActivationSpec())).has_static_inputs
    assert "static" in repr(layer)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_are_refused(pack: Pack, value: float) -> None:
    layer = pack(nn.Linear(32, 8), STATIC)
    with pytest.raises(ValueError, match="inputs of weight must be finite and positive"):
        layer.set_input_scale("weight", torch.tensor(value))
    layer.set_input_scale("weight", SCALE)
    layer.check()
    layer.get_parameter("weight_input_scale").data = torch.tensor([value]).view(torch.int32)
    with pytest.raises(CorruptWeightError, match="weight_input_scale holds values that are not finite and positive"):
        layer.check()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped"])
@torch.no_grad()
def test_products_read_the_stored_scale(pack: Pack, kind: str) -> None:
    """What is clipped shows that it is this scale and no other."""
    torch.manual_seed(0)
    module: nn.Module
    if kind == "linear":
        module, x = nn.Linear(32, 8), torch.randn(5, 32)
    else:
        module, x = nn.Conv2d(32, 8, 3, padding=1, groups=2 if kind == "grouped" else 1), torch.randn(1, 32, 6, 6)
    layer = pack(module, STATIC)
    layer.set_input_scale("weight", SCALE)
    rounded = restore_tokens(*quantize_tokens(x.reshape(1, -1), STATIC.activation, SCALE.reshape(1)))  # type: ignore[arg-type]
    assert rounded.abs().max() == 127 * SCALE < x.abs().max()
    expected = layer.to_float(torch.float32)(rounded.reshape(x.shape))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_have_one_each_and_for_each_projection(pack: Pack) -> None:
    """So that transformers can split gate from up, and one expert from the next."""
    layer: Any = pack(experts(), STATIC)
    shapes = {name: layer.input_companions(name)[f"{name}_input_scale"] for name in layer.packed_parameters}
    assert shapes == {"gate_up_proj": ((4, 2), torch.int32), "down_proj": ((4, 1), torch.int32)}
    for name in layer.packed_parameters:
        layer.set_input_scale(name, SCALE)
    layer.check()
    read = torch.full((4, 2), 0.5).view(torch.int32)
    read[2] = torch.full((2,), 0.01).view(torch.int32)
    layer.get_parameter("gate_up_proj_input_scale").data = read
    x = torch.randn(3, 64)
    for expert, scale in ((1, 0.5), (2, 0.01)):
        packed = layer.packed("gate_up_proj")[expert]
        expected = packed_linear(x, packed, STATIC.activation, input_scale=torch.tensor([scale]))
        assert torch.equal(layer._project("gate_up_proj", expert, x), expected)


@torch.no_grad()
def test_before_it_is_set_every_call_has_its_own(pack: Pack) -> None:
    layer, x = pack(nn.Linear(32, 8), STATIC), torch.randn(5, 32)
    del layer.weight_input_scale  # of a layer that is still being calibrated
    assert layer.input_scale() is None
    own = layer(x)
    layer.set_input_scale("weight", x.abs().max() / 127)
    assert torch.equal(layer(x), own)


@torch.no_grad()
def test_siblings_share_inputs_only_if_their_scales_are_equal(pack: Pack) -> None:
    torch.manual_seed(0)
    attention = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, pack(nn.Linear(32, 8), STATIC))
        getattr(attention, name).set_input_scale("weight", SCALE)
    x = torch.randn(4, 32)
    alone = [attention.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    assert connect_siblings(attention) == 1
    for name, expected in zip(("q_proj", "k_proj", "v_proj"), alone, strict=True):
        assert torch.equal(attention.get_submodule(name)(x), expected)
    other = copy.deepcopy(attention)
    other.get_submodule("k_proj").set_input_scale("weight", 2 * SCALE)  # type: ignore[operator]
    for module in other.children():
        module.siblings = None  # type: ignore[assignment]
    assert connect_siblings(other) == 1
    assert other.get_submodule("k_proj").siblings is None


@torch.no_grad()
def test_a_compiled_layer_reads_the_stored_scale(pack: Pack) -> None:
    torch.manual_seed(0)
    layer, x = pack(nn.Linear(32, 8), STATIC), torch.randn(5, 32)
    layer.set_input_scale("weight", SCALE)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
