"""Packed fused experts against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.nn import LayerSpec, PackedExperts, PackedModule

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
HIDDEN, INTERMEDIATE, EXPERTS = 32, 16, 5


def qwen() -> nn.Module:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    return initialised(config, Qwen3MoeExperts)


def mixtral() -> nn.Module:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    return initialised(config, MixtralExperts)


def initialised(config: Any, cls: Any) -> nn.Module:
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module: nn.Module = cls(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def routed(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), index, torch.rand(tokens, 2, generator=generator)


every_model = pytest.mark.parametrize("make", [qwen, mixtral])


@every_model
@pytest.mark.parametrize("low_rank", [0, 3])
@pytest.mark.parametrize("group_size", [None, 8, "tensor"])
def test_equals_transformers_with_dequantized_weights(
    make: Callable[[], nn.Module], group_size: Any, low_rank: int, pack: Pack
) -> None:
    module = pack(make(), LayerSpec(WeightSpec("int", 3, group_size, symmetric=False), low_rank=low_rank))
    assert isinstance(module, PackedExperts)
    expected = module.to_float(torch.float32)(*routed())
    assert torch.allclose(module(*routed()), expected, atol=1e-5)


@every_model
def test_the_branch_has_a_block_for_the_gate_and_one_for_the_up_projection(
    make: Callable[[], nn.Module], pack: Pack
) -> None:
    module = pack(make(), LayerSpec(WeightSpec("int", 2), low_rank=3))
    assert module.gate_up_proj_low_rank_a.shape == (EXPERTS, 2 * 3, HIDDEN)
    assert module.gate_up_proj_low_rank_b.shape == (EXPERTS, 2 * INTERMEDIATE, 3)
    assert module.down_proj_low_rank_a.shape == (EXPERTS, 3, INTERMEDIATE)
    error = (make().gate_up_proj - module.dequantized("gate_up_proj")).unflatten(1, (2, -1)).norm(dim=(-1, -2))
    plain = (
        (make().gate_up_proj - module.dequantized("gate_up_proj", branch=False))
        .unflatten(1, (2, -1))
        .norm(dim=(-1, -2))
    )
    assert (error < plain).all()  # for every expert, gate and up alike


@every_model
@pytest.mark.parametrize("activation", [ActivationSpec("int", 8), ActivationSpec("float8_e4m3fn", 8)])
def test_quantized_inputs_stay_close(make: Callable[[], nn.Module], activation: ActivationSpec, pack: Pack) -> None:
    module = pack(make(), LayerSpec(WeightSpec("int", 8), activation))
    expected = module.to_float(torch.float32)(*routed())
    assert (module(*routed()) - expected).norm() < 0.1 * expected.norm()


def test_a_token_of_another_device_is_left_out(pack: Pack) -> None:
    """transformers marks it with an index past the last expert."""
    module = pack(qwen(), LayerSpec(WeightSpec()))
    x, index, weights = routed()
    index[4] = EXPERTS
    y = module(x, index, weights)
    assert (y[4] == 0).all()
    torch.testing.assert_close(y[:4], module(*routed())[:4])


def test_no_tokens(pack: Pack) -> None:
    x, index, weights = (tensor[:0] for tensor in routed())
    assert pack(qwen(), LayerSpec(WeightSpec()))(x, index, weights).shape == (0, HIDDEN)


def test_every_companion_keeps_experts_first_and_rows_second(pack: Pack) -> None:
    """transformers merges per-expert tensors along these two and splits them again."""
    module = pack(qwen(), LayerSpec(WeightSpec("nf", 4, "tensor", symmetric=False)))
    for name in module.packed_parameters:
        leading = module.matrix_shape(name)[0]
        for key in module.companion_shapes(name):
            assert getattr(module, key).shape[:2] == leading
