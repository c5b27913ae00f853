"""Straight-through estimators: quantized on the way forward, the identity on the way back (arXiv 1308.3432)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens


def simulate_activation(x: Tensor, spec: ActivationSpec) -> Tensor:
    """x ``[..., columns]`` as a layer reads it that quantizes its input per token; gradients pass straight through."""
    with torch.no_grad():
        codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]), spec)
        values = (codes.float() * scale).reshape(x.shape)
    return x + (values - x).detach()
