"""What single experts of a fused experts module read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def expert_inputs(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[str, int, Tensor]]:
    """(parameter, expert, inputs ``[tokens, channels]``) of every expert that a call routes tokens to.

    Args:
        module: float gated experts as :class:`hf_lowbit.nn.PackedExperts` packs them.
        args, kwargs: of its call: tokens, chosen experts, weights.
    """
    call = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    _, x, chosen = list(call.values())[:3]
    gate_up_proj: Any = module.gate_up_proj
    act_fn: Any = module.act_fn
    x = x.reshape(-1, x.shape[-1])
    for expert in chosen.unique().tolist():
        if expert >= gate_up_proj.shape[0]:
            continue
        token = torch.where(chosen == expert)[0]
        tokens = x[token]
        yield "gate_up_proj", expert, tokens
        gate, up = F.linear(tokens, gate_up_proj[expert].to(tokens.dtype)).chunk(2, -1)
        yield "down_proj", expert, act_fn(gate) * up
