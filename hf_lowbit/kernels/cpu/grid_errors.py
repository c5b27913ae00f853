"""What grids lose of weights, natively."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat
from hf_lowbit.kernels.cpu.products import _check, _library

_ROUNDING = struct.Struct("@13q")


def rounding_errors(
    grouped: Tensor, scale: Tensor, zero_point: Tensor, number_format: NumberFormat, importance: Tensor
) -> Tensor:
    """:func:`hf_lowbit.kernels.rounding_errors` of float32 tensors on a CPU."""
    rows, groups, size = grouped.shape
    tensors = [tensor.contiguous() for tensor in (grouped, scale, zero_point, importance)]
    errors = torch.empty(rows, groups)
    levels = first = last = 0
    if number_format.is_integer_grid:
        first, last = (int(number_format.table[end]) for end in (0, -1))
    else:
        tensors += [tensor.contiguous() for tensor in number_format.levels]
        levels = len(tensors[-2])
    addresses = [tensor.data_ptr() for tensor in tensors]
    arguments = _ROUNDING.pack(
        *addresses, *[0] * (6 - len(addresses)), errors.data_ptr(), rows, groups, size, levels, first, last
    )
    _check(_library().hfl_rounding_errors(arguments, torch.get_num_threads()))
    return errors
