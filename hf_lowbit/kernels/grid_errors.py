"""What grids lose of weights: asked some dozens of times for each weight where clipping ranges are searched."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat
from hf_lowbit.kernels import cpu


def rounding_errors(
    grouped: Tensor, scale: Tensor, zero_point: Tensor, number_format: NumberFormat, importance: Tensor
) -> Tensor:
    """Sum over each group of importance * (w - w_hat)^2, ``[rows, groups]`` float32.

    w_hat is ``scale * (level - zero_point)`` with the level of the format nearest to ``w / scale + zero_point``. A
    native kernel does all of it in registers; its sums differ in their order from torch's.

    Args:
        grouped: finite float32 ``[rows, groups, g]``.
        scale, zero_point: float32 ``[rows, groups]``; a scale of 0 is that of a group without weights.
        importance: float32 ``[groups, g]``.
    """
    tensors = (grouped, scale, zero_point, importance)
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and cpu.available():
        return cpu.rounding_errors(grouped, scale, zero_point, number_format, importance)
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    levels = number_format.nearest(grouped / torch.where(scale == 0, 1.0, scale) + zero_point)
    difference = grouped - (levels - zero_point).mul_(scale)
    return difference.square_().mul_(importance).sum(-1)
