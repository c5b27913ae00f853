"""Quantization of inputs whose step sizes are learned (LSQ, arXiv 1902.08153, without its scaling of gradients)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def quantize_with_steps(x: Tensor, steps: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """step * clamp(round(x / step), first, last), with gradients of x and of the steps.

    Rounding is the identity for gradients. Those of x end where it is clipped; there a step has that of its last level.

    Args:
        x: ``[..., columns]``.
        steps: float32 ``[groups]``, positive; each of the columns in turn.
        first, last: the lowest and the highest level of each group in units of its step, integers in float32
            ``[groups]``: zero, which they contain, is exact.
    """
    result: Tensor = _Steps.apply(x, steps, first, last)
    return result


class _Steps(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, first: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(x, steps, first, last)
        units = _units(x, steps).round_()
        clipped = torch.minimum(torch.maximum(units, first.unsqueeze(-1)), last.unsqueeze(-1))
        return clipped.mul_(steps.unsqueeze(-1)).reshape(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, steps, first, last = ctx.saved_tensors
        units = _units(x, steps)
        level = units.round()
        inside = (level >= first.unsqueeze(-1)) & (level <= last.unsqueeze(-1))
        gradient = gradients[0].float().reshape(units.shape)
        to_steps = None
        if ctx.needs_input_grad[1]:
            level = torch.minimum(torch.maximum(level, first.unsqueeze(-1)), last.unsqueeze(-1))
            to_steps = level.sub_(units.mul_(inside)).mul_(gradient).sum(-1).flatten(0, -2).sum(0)
        return gradient.mul(inside).reshape(x.shape).to(x.dtype), to_steps, None, None


def _units(x: Tensor, steps: Tensor) -> Tensor:
    """float32 ``[..., groups, columns / groups]``, new."""
    return x.float().unflatten(-1, (steps.numel(), -1)) / steps.unsqueeze(-1)
