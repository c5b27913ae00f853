# mypy: disable-error-code="no-untyped-def"
"""The sweep of GPTQ over a block of columns, in one launch: round one, take its error from the later ones, go on.

Rows are independent of each other, so that every program keeps some of them, all columns of the block, in registers
from the first column to the last. As single operations of torch a block of 128 columns is about a thousand launches of
microseconds each, which take longer than their work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.kernels.triton.device import on_device_of

_ROWS, _WARPS = 32, 4  # of a program
_HALF_UNITS = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer, ties to even


def round_columns(
    work: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    groups: Tensor,
    values: Tensor,
    boundaries: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Nearest values of columns one by one, each one's error taken from those after it.

    Args:
        work: float32 ``[n, rows]``, the columns as they are now, contiguous; it is not changed.
        factor: float32 ``[n, n]``, upper triangular: what an error costs the later columns; any strides.
        scale, zero_point: float32 ``[groups, rows or 1]``, contiguous.
        groups: int32 ``[n]``, of each column.
        values: float32, the format's values in ascending order; of integers the first and the last.
        boundaries: float32, one fewer than values: what is not above a boundary belongs to the value below it. None
            for integers, which are rounded, ties to even.

    Returns:
        Values in units of the scales, and errors (w - q) / U_ii, float32 ``[n, rows]`` each.
    """
    count, rows = work.shape
    factor = factor.contiguous()  # a solver may have left it by columns
    units, errors = torch.empty_like(work), torch.empty_like(work)
    with on_device_of(work):
        _round_columns[triton.cdiv(rows, _ROWS),](
            work, factor, scale, zero_point, groups, values, boundaries, units, errors, count, rows, len(values),
            INTEGERS=boundaries is None, ONE_GRID=scale.shape[1] == 1,
            COLUMNS=triton.next_power_of_2(count), ROWS=_ROWS, num_warps=_WARPS,
        )  # fmt: skip
    return units, errors


@triton.jit
def _round_columns(
    work, factor, scale, zero_point, groups, values, boundaries, units, errors, count, rows, levels,
    INTEGERS: tl.constexpr, ONE_GRID: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    block = tl.load(
        work + column[:, None] * rows + row[None, :], mask=(column[:, None] < count) & there[None, :], other=0.0
    )
    lowest = tl.load(values)
    highest = tl.load(values + levels - 1)
    for i in range(count):
        w = tl.sum(tl.where((column == i)[:, None], block, 0.0), 0)
        group = tl.load(groups + i)
        if ONE_GRID:
            s = tl.zeros([ROWS], tl.float32) + tl.load(scale + group)
            z = tl.zeros([ROWS], tl.float32) + tl.load(zero_point + group)
        else:
            s = tl.load(scale + group * rows + row, mask=there, other=1.0)
            z = tl.load(zero_point + group * rows + row, mask=there, other=0.0)
        x = tl.div_rn(w, tl.where(s == 0, 1.0, s)) + z
        if INTEGERS:
            q = tl.minimum(tl.maximum(x, lowest), highest)
            q = (q + _HALF_UNITS) - _HALF_UNITS
        else:
            q = tl.zeros([ROWS], tl.float32) + lowest
            for level in range(1, levels):
                q = tl.where(x > tl.load(boundaries + level - 1), tl.load(values + level), q)
        error = tl.div_rn(w - (q - z) * s, tl.zeros([ROWS], tl.float32) + tl.load(factor + i * count + i))
        tl.store(units + i * rows + row, q, mask=there)
        tl.store(errors + i * rows + row, error, mask=there)
        taken = tl.load(factor + i * count + column, mask=(column > i) & (column < count), other=0.0)
        block -= taken[:, None] * error[None, :]
