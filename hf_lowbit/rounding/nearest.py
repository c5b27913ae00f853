"""Round to nearest, data-free: a grid from each group's range, codes by the closest table value.

Codes are computed from the scale as stored (after rounding to bfloat16 or float16), not from the exact one: with the
exact one the grid that is read back would lie beside the grid that was rounded to.
"""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode_rows
from hf_lowbit.rounding.clip import fit_range
from hf_lowbit.rounding.grid import RoundingError
from hf_lowbit.rounding.store import round_with, row_chunks, stack


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
        return stack([round_to_nearest(matrix, spec) for matrix in weight])
    return round_with(fit_range, weight, spec)


def relative_error(weight: Tensor, packed: PackedTensor) -> float:
    """||w - w_hat|| / ||w|| in the Frobenius norm, 0 for an all-zero weight; both sides are read in chunks."""
    pairs = (
        zip(weight, (packed[i] for i in range(len(weight))), strict=True) if weight.dim() == 3 else [(weight, packed)]
    )
    error = norm = 0.0
    for matrix, matrix_packed in pairs:
        for rows in row_chunks(matrix):
            exact = matrix[rows].float()
            error += (exact - decode_rows(matrix_packed, rows)).square().sum().item()
            norm += exact.square().sum().item()
    return (error / norm) ** 0.5 if norm else 0.0
