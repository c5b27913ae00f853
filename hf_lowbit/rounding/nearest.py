"""Round to nearest, data-free: a grid from each group's range, codes by the closest table value.

Codes are computed from the scale as stored (after rounding to bfloat16 or float16), not from the exact one: with the
exact one the grid that is read back would lie beside the grid that was rounded to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, decode_rows, pack_codes
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.rounding.codebook import fit_codebook
from hf_lowbit.rounding.grid import Grid, RoundingError, fit_grid

_CHUNK_ELEMENTS = 1 << 20  # rows are rounded in chunks: float32 temporaries stay a few megabytes


def round_to_nearest(weight: Tensor, spec: WeightSpec) -> PackedTensor:
    """Quantize a weight.

    Args:
        weight: float ``[rows, columns]``, or ``[experts, rows, columns]``.
        spec: format and granularity; its group must divide the columns.

    Raises:
        RoundingError: NaN or infinite weights, or scales that ``spec.scale_dtype`` cannot hold.
    """
    if weight.dim() == 3:
        if spec.has_fitted_table:
            raise RoundingError("a fitted codebook cannot be stored per expert: give codebook=[...] or another format")
        return _stack([round_to_nearest(matrix, spec) for matrix in weight])
    table = fit_codebook(weight, spec) if spec.has_fitted_table else None
    number_format = spec.number_format if table is None else NumberFormat("codebook", spec.bits, table)
    one_grid = _tensor_grid(weight, spec, number_format) if spec.group_size == "tensor" else None
    words, grids = [], []
    for chunk in weight.split(max(1, _CHUNK_ELEMENTS // weight.shape[1])):
        grouped = _grouped(chunk, spec)
        grid = one_grid or fit_grid(grouped, spec, number_format)
        codes = number_format.encode(grid.to_table_units(grouped))
        words.append(pack_codes(codes.reshape(chunk.shape), spec.bits, spec.packing))
        grids.append(grid)
    grid = one_grid or Grid(*(torch.cat(parts) for parts in zip(*grids, strict=True)))
    return PackedTensor(
        weight=torch.cat(words),
        scale=to_bits(grid.scale, spec.scale_dtype),
        spec=spec,
        columns=weight.shape[1],
        zero_point=_store_zero_point(grid.zero_point, spec, number_format),
        table=None if table is None else table.view(torch.int32).to(weight.device),
    )


def relative_error(weight: Tensor, packed: PackedTensor) -> float:
    """||w - w_hat|| / ||w|| in the Frobenius norm, 0 for an all-zero weight; both sides are read in chunks."""
    pairs = (
        zip(weight, (packed[i] for i in range(len(weight))), strict=True) if weight.dim() == 3 else [(weight, packed)]
    )
    error = norm = 0.0
    for matrix, matrix_packed in pairs:
        step = max(1, _CHUNK_ELEMENTS // packed.columns)
        for start in range(0, matrix.shape[0], step):
            exact = matrix[start : start + step].float()
            error += (exact - decode_rows(matrix_packed, slice(start, start + step))).square().sum().item()
            norm += exact.square().sum().item()
    return (error / norm) ** 0.5 if norm else 0.0


def _grouped(matrix: Tensor, spec: WeightSpec) -> Tensor:
    """float32 ``[rows, groups, g]`` view of ``[rows, columns]``."""
    rows, columns = matrix.shape
    return matrix.float().reshape(rows, spec.groups(columns), -1)


def _tensor_grid(weight: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Grid:
    return fit_grid(weight.float().reshape(1, 1, -1), spec, number_format)


def _store_zero_point(zero_point: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Tensor | None:
    if spec.symmetric:
        return None
    if spec.has_integer_zero_point:
        return pack_codes(number_format.encode(zero_point), spec.bits)
    return to_bits(zero_point, spec.scale_dtype)


def _stack(matrices: list[PackedTensor]) -> PackedTensor:
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
