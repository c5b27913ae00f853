"""Straight-through estimators: quantized on the way forward, the identity on the way back (arXiv 1308.3432)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens


def simulate_activation(
    x: Tensor,
    spec: ActivationSpec,
    through_scale: bool = False,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
) -> Tensor:
    """x ``[..., columns]`` as a layer reads it that quantizes its input; gradients pass straight through.

    Args:
        through_scale: they also reach the largest magnitude behind each scale, with which its steps and so its error
            grow: what learns to make the inputs easier to quantize needs that.
        input_scale, input_shift: of a static spec, float32 ``[groups]`` or ``[tokens, groups]``; None takes those of x,
            while they are not known yet.
    """
    with torch.no_grad():
        codes = quantize_tokens(x.reshape(-1, x.shape[-1]), spec, input_scale, input_shift)
        values = restore_tokens(*codes).reshape(x.shape)
    error = (values - x).detach()
    if through_scale:
        largest = _largest(x, spec)
        fixed = largest.detach()
        error = error * (1 + (largest - fixed) / torch.where(fixed == 0, torch.ones_like(fixed), fixed))
    return x + error


def _largest(x: Tensor, spec: ActivationSpec) -> Tensor:
    """The magnitude behind the scale of each value, in a shape that broadcasts to x."""
    grouped = x.abs().unflatten(-1, (spec.groups(x.shape[-1]), -1)).amax(-1)
    largest = grouped.amax(tuple(range(x.dim() - 1)), keepdim=True) if spec.static else grouped
    return largest.repeat_interleave(x.shape[-1] // largest.shape[-1], -1)
