"""Straight-through estimators: quantized on the way forward, the identity on the way back (arXiv 1308.3432)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens


def simulate_activation(x: Tensor, spec: ActivationSpec, through_scale: bool = False) -> Tensor:
    """x ``[..., columns]`` as a layer reads it that quantizes its input per token; gradients pass straight through.

    Args:
        through_scale: they also reach each token's largest magnitude, with which its steps and so its error grow: what
            learns to make the inputs easier to quantize needs that.
    """
    with torch.no_grad():
        codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]), spec)
        values = (codes.float() * scale).reshape(x.shape)
    error = (values - x).detach()
    if through_scale:
        largest = x.abs().amax(-1, keepdim=True)
        fixed = largest.detach()
        error = error * (1 + (largest - fixed) / torch.where(fixed == 0, torch.ones_like(fixed), fixed))
    return x + error
