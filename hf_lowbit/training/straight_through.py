"""Straight-through estimators: quantized on the way forward, the identity on the way back (arXiv 1308.3432)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens


def simulate_activation(
    x: Tensor, spec: ActivationSpec, through_scale: bool = False, input_scale: Tensor | None = None
) -> Tensor:
    """x ``[..., columns]`` as a layer reads it that quantizes its input; gradients pass straight through.

    Args:
        through_scale: they also reach the largest magnitude behind each scale, with which its steps and so its error
            grow: what learns to make the inputs easier to quantize needs that.
        input_scale: of a static spec, float32 ``[1]``; None takes that of x, while it is not known yet.
    """
    with torch.no_grad():
        values = restore_tokens(*quantize_tokens(x.reshape(-1, x.shape[-1]), spec, input_scale)).reshape(x.shape)
    error = (values - x).detach()
    if through_scale:
        largest = _largest(x, spec)
        fixed = largest.detach()
        error = error * (1 + (largest - fixed) / torch.where(fixed == 0, torch.ones_like(fixed), fixed))
    return x + error


def _largest(x: Tensor, spec: ActivationSpec) -> Tensor:
    """The magnitude behind the scale of each value, in a shape that broadcasts to x."""
    if spec.static:
        return x.abs().amax()
    if spec.group_size is None:
        return x.abs().amax(-1, keepdim=True)
    return x.abs().unflatten(-1, (-1, spec.group_size)).amax(-1).repeat_interleave(spec.group_size, -1)
