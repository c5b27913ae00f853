"""Models that Quamba2 is tried on, and what it makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_lowbit
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_state_space import TINY, tokens

W4A8, W4A16 = {"bits": 4, "group_size": 16}, {"bits": 4, "group_size": 16, "activation_bits": None}
SECOND = [name for name, tiny in TINY.items() if tiny.generation == 2]


def batches(count: int = 4, length: int = 40) -> list[dict[str, Tensor]]:
    """Two sequences each."""
    return [{"input_ids": tokens(2, length, seed)} for seed in range(count)]


def uneven_mamba2() -> Any:
    """A few channels of x are far larger than the others, not the same ones in every head; the function is tame."""
    model = TINY["mamba2"].create()
    generator = torch.Generator().manual_seed(0)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        for head in range(4):
            for channel in torch.randperm(16, generator=generator)[:3] + 16 * head:
                mixer.conv1d.weight.data[channel] *= 30
                mixer.out_proj.weight.data[:, channel] /= 30
    return model


def quantized(model: Any, **values: Any) -> Any:
    """In place, on :func:`batches`."""
    return hf_lowbit.quantize(model, Quamba2Config(**values, dataset=batches(), num_samples=8))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """For tokens that nothing was calibrated on."""
    logits: Tensor = model(tokens(2, 48, seed=9), use_cache=False).logits
    return logits


def notes_of(model: Any) -> list[str]:
    return hf_lowbit.report(model).warnings


def mixer_of(model: Any, layer: int = 0) -> Any:
    return model.backbone.layers[layer].mixer
