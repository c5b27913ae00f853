"""A tiny Llama whose layers read outlier channels, and what tests of calibrated methods do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeForCausalLM

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.walk import Walk, Walked
from hf_lowbit.config import LowbitConfig
from hf_lowbit.formats import decode
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.plan import build_plan, packed_modules
from hf_lowbit.state import shared_weights
from hf_lowbit.tensorwise import pack_parameter
from tests.matrix.models import MODELS

OUTLIERS = {3: 40.0, 17: -25.0, 40: 60.0}  # channel -> weight of every norm in a block
IDLE = "no token of the calibration data reaches it: rounded to nearest"


def outlier_llama(layers: int = 2) -> LlamaForCausalLM:
    """Two value heads for four query heads; three channels of every norm of a block are large."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=layers, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data.uniform_(0.5, 1.5)
            for channel, weight in OUTLIERS.items():
                parameter.data[channel] = weight
    return model


def token_batches(count: int = 4, tokens: int = 48, seed: int = 1) -> list[dict[str, Tensor]]:
    """Random sequences, two to a batch."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(256, (2, tokens), generator=generator)} for _ in range(count)]


def one_token() -> list[dict[str, Tensor]]:
    """Data that reaches as many experts as one token chooses."""
    return [{"input_ids": torch.tensor([[5]])}] * 2


def tiny_moe() -> Qwen3MoeForCausalLM:
    """Four experts, two for each token."""
    torch.manual_seed(0)
    return MODELS["qwen3_moe"].build().eval()


@torch.no_grad()
def logit_error(model: nn.Module, reference: nn.Module) -> float:
    """Squared error of the logits beside their squares, on tokens that nothing was calibrated on."""
    wrong = right = 0.0
    for batch in token_batches(seed=2):
        expected = reference(**batch).logits
        wrong += float((model(**batch).logits - expected).square().sum())
        right += float(expected.square().sum())
    return wrong / right


def quantized(model: nn.Module, config: LowbitConfig, batches: list[dict[str, Tensor]] | None = None) -> Any:
    """The model, quantized in place on these batches."""
    data = token_batches() if batches is None else batches
    samples = sum(len(batch["input_ids"]) for batch in data)
    return hf_lowbit.quantize(model, replace(config, dataset=data, num_samples=samples))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Name of every packed parameter -> its dequantized values."""
    return {
        f"{name}.{parameter}": decode(module.packed(parameter))
        for name, module in packed_modules(model).items()
        for parameter in module.packed_parameters
    }


def walk(
    model: nn.Module,
    step: Callable[[Block], None],
    batches: list[dict[str, Any]] | None = None,
    config: LowbitConfig | None = None,
    **options: Any,
) -> Walked:
    """Hand every block of a model to ``step``; what it leaves is rounded to nearest."""
    config = config or hf_lowbit.RTNConfig(bits=4, group_size=32, symmetric=False)
    plan = build_plan(model, config, model_facts(model, shared_weights(model)))
    data = token_batches() if batches is None else batches
    return Walk(model, plan.layers, step, data, pack_parameter, **options).run()


def outputs_of(block: Block) -> Tensor:
    """What a block returns for all of its data."""
    return torch.cat([block.run(batch).reshape(-1) for batch in range(len(block))])


def relative(new: Tensor, old: Tensor) -> float:
    """||new - old|| / ||old||."""
    return float((new.double() - old.double()).norm() / old.double().norm())
