"""Quantize and dequantize with closed-form straight-through gradients: few temporaries, and little kept for backward.

Rounding is taken for the identity (Bengio et al., arXiv 1308.3432), clamping for what it is. Weights are
``[n, groups, g]``; scales and zero points ``[n, groups]``. w_hat = scale * (level - zero_point).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from hf_lowbit.formats.number_format import look_up
from hf_lowbit.formats.packed import from_bits, to_bits
from hf_lowbit.rounding.grid import nonzero
from hf_lowbit.rounding.learned.levels import Levels

_where_within = torch.ops.aten.hardtanh_backward  # a vectorised gradient * (low < x < high)


def stored(values: Tensor, scale_dtype: str) -> Tensor:
    """Values after their round trip through storage; its rounding is the identity for gradients."""
    return replaced(values, from_bits(to_bits(values.detach(), scale_dtype), scale_dtype))


def rounded(values: Tensor) -> Tensor:
    """Nearest integers; the identity for gradients."""
    return replaced(values, values.detach().round())


def replaced(values: Tensor, replacement: Tensor) -> Tensor:
    """``replacement``, with the gradients of ``values``."""
    return _Replace.apply(values, replacement)


class _Replace(Function):
    """``replacement`` forward, the identity backward: unlike x + (r - x).detach(), to the last bit."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, replacement: Tensor) -> Tensor:
        return replacement

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def quantize(weight: Tensor, shift: Tensor | None, scale: Tensor, zero_point: Tensor | None, levels: Levels) -> Tensor:
    """Simulated quantization ``[n, groups, g]``: the level nearest to w / scale + zero_point, moved by ``shift``.

    The shift V of SignRound (arXiv 2309.05516), in units of the step between the two levels around the weight, so
    that it means the same for integers and for any table [ours]. Gradients reach shift, scale and zero point, and a
    weight that has some: those within the grid.
    """
    if levels.uniform:
        return _Uniform.apply(weight, shift, scale, zero_point, levels)
    return _Table.apply(weight, shift, scale, zero_point, levels)


def nearest(weight: Tensor, shift: Tensor | None, scale: Tensor, zero_point: Tensor | None, levels: Levels) -> Tensor:
    """int32 index ``[n, groups, g]`` of the level that :func:`quantize` takes."""
    if levels.uniform:
        x = _uniform_position(weight, shift, scale, zero_point)
        return x.round_().clamp_(levels.low, levels.high).sub_(levels.low).int()
    return levels.nearest(_table_position(weight, shift, scale, zero_point, levels)[0])


def position(weight: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Levels) -> Tensor:
    """Real position ``[n, groups, g]`` of each weight among the levels, the first at 0."""
    if levels.uniform:
        return _uniform_position(weight, None, scale, zero_point).sub_(levels.low)
    return _table_position(weight, None, scale, zero_point, levels)[0]


class _Uniform(Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, shift: Tensor | None, scale: Tensor, zero_point: Tensor | None, levels: Levels
    ) -> Tensor:
        ctx.low, ctx.high = levels.low, levels.high
        x = _uniform_position(weight, shift, scale, zero_point)
        ctx.save_for_backward(weight, x, scale, zero_point)
        return _dequantize(x.round().clamp_(ctx.low, ctx.high), scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, x, scale, _ = ctx.saved_tensors
        within = _where_within(gradient, x, ctx.low - 0.5, ctx.high + 0.5)
        level = x.round().clamp_(ctx.low, ctx.high) if ctx.needs_input_grad[2] else None
        to_scale, to_zero = _grid_gradients(ctx, gradient, within, level)
        to_weight = within.clone() if ctx.needs_input_grad[0] else None  # the next line overwrites it
        to_shift = within.mul_(scale.unsqueeze(-1)) if ctx.needs_input_grad[1] else None
        return to_weight, to_shift, to_scale, to_zero, None


class _Table(Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, shift: Tensor | None, scale: Tensor, zero_point: Tensor | None, levels: Levels
    ) -> Tensor:
        x, below = _table_position(weight, shift, scale, zero_point, levels)
        ctx.levels = levels
        ctx.save_for_backward(weight, x, scale, zero_point, below.to(torch.uint8))
        return _dequantize(levels.value(x).to(x.dtype), scale, zero_point)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, x, scale, _, below = ctx.saved_tensors
        levels = ctx.levels
        within = _where_within(gradient, x, -0.5, len(levels) - 0.5)
        level = levels.value(x).to(x.dtype) if ctx.needs_input_grad[2] else None
        to_scale, to_zero = _grid_gradients(ctx, gradient, within, level)
        to_weight = within.clone() if ctx.needs_input_grad[0] else None
        to_shift = None
        if ctx.needs_input_grad[1]:
            to_shift = within.mul_(look_up(levels.steps, below)).mul_(scale.unsqueeze(-1))
        return to_weight, to_shift, to_scale, to_zero, None


def _uniform_position(weight: Tensor, shift: Tensor | None, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Where each weight lies among the integers, before rounding."""
    x = weight / nonzero(scale).unsqueeze(-1)
    if zero_point is not None:
        x += zero_point.unsqueeze(-1)
    if shift is not None:
        x += shift
    return x


def _table_position(
    weight: Tensor, shift: Tensor | None, scale: Tensor, zero_point: Tensor | None, levels: Levels
) -> tuple[Tensor, Tensor]:
    """Where each weight lies among a table's values, before rounding, and the index of the value below it."""
    x = _uniform_position(weight, None, scale, zero_point)
    below = levels.interval(x)
    x -= look_up(levels.values, below)
    x /= look_up(levels.steps, below)
    x += below
    if shift is not None:
        x += shift
    return x, below


def _dequantize(level: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is not None:
        level -= zero_point.unsqueeze(-1)
    return level.mul_(scale.unsqueeze(-1))


def _grid_gradients(
    ctx: Any, gradient: Tensor, within: Tensor, level: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dw_hat/dscale = level - z - [within] w/s, dw_hat/dz = -s [beyond the grid]: within, z and rounding cancel."""
    weight, _, scale, zero_point = ctx.saved_tensors[:4]
    total = gradient.sum(-1) if zero_point is not None else 0.0
    to_scale = to_zero = None
    if level is not None:
        to_scale = level.mul_(gradient).sum(-1) - (within * weight).sum(-1) / nonzero(scale)
        if zero_point is not None:
            to_scale -= zero_point * total
    if ctx.needs_input_grad[3]:
        to_zero = (within.sum(-1) - total) * scale
    return to_scale, to_zero
