"""From codes on a grid to a packed tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, pack_codes
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.rounding.grid import Grid


def to_packed(
    codes: Tensor, grid: Grid, spec: WeightSpec, number_format: NumberFormat, table: Tensor | None = None
) -> PackedTensor:
    """Codes and their grid as they are stored.

    Args:
        codes: uint8 ``[rows, columns]``.
        grid: scales and zero points that storage holds exactly.
        number_format: what the codes mean.
        table: float32 ``[2^bits]`` where the spec stores one of its own.
    """
    return PackedTensor(
        weight=pack_codes(codes, spec.bits, spec.packing),
        scale=to_bits(grid.scale, spec.scale_dtype),
        spec=spec,
        columns=codes.shape[1],
        zero_point=stored_zero_point(grid.zero_point, spec, number_format),
        table=None if table is None else table.view(torch.int32).to(codes.device),
    )


def stored_zero_point(zero_point: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Tensor | None:
    """Packed codes for integer grids, bit patterns for others, nothing for symmetric ones."""
    if spec.symmetric:
        return None
    if spec.has_integer_zero_point:
        return pack_codes(number_format.encode(zero_point), spec.bits)
    return to_bits(zero_point, spec.scale_dtype)


def stack(matrices: list[PackedTensor]) -> PackedTensor:
    """Experts in one stack, with a scale per row even where one was computed for the whole matrix."""
    first = matrices[0]
    rows = first.weight.shape[0]

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.expand(rows, *tensor.shape[1:]) for tensor in tensors])

    zero_points = [matrix.zero_point for matrix in matrices if matrix.zero_point is not None]
    return PackedTensor(
        weight=stacked([matrix.weight for matrix in matrices]),
        scale=stacked([matrix.scale for matrix in matrices]),
        spec=first.spec,
        columns=first.columns,
        zero_point=stacked(zero_points) if zero_points else None,
    )
