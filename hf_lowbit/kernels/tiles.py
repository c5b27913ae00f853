"""Products with many tokens: some rows are decoded into a buffer that stays in the cache, torch multiplies them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.routes import multiplies_fast

_TILE_BYTES = 1 << 21


def tiled_product(x: Tensor, matrix: cpu.Matrix) -> Tensor:
    """x ``[tokens, columns]`` to ``[tokens, rows]`` in x's type, multiplied in it or float32, whichever is faster."""
    inputs = x if multiplies_fast(x.dtype) else x.float()
    result = torch.empty(x.shape[0], matrix.rows, dtype=x.dtype)
    for rows, tile in _tiles(matrix, inputs.dtype):
        result[:, rows] = inputs @ tile.t()
    return result


def tiled_gradient(gradient: Tensor, matrix: cpu.Matrix) -> Tensor:
    """Gradient ``[tokens, rows]`` times the weight: ``[tokens, columns]`` in the gradient's type, summed in float32."""
    inputs = gradient if multiplies_fast(gradient.dtype) else gradient.float()
    result = torch.zeros(gradient.shape[0], matrix.columns)
    for rows, tile in _tiles(matrix, inputs.dtype):
        result += inputs[:, rows] @ tile
    return result.to(gradient.dtype)


def _tiles(matrix: cpu.Matrix, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their decoded rows, in one buffer that the next tile overwrites."""
    step = max(16, _TILE_BYTES // (matrix.columns * dtype.itemsize))
    buffer = torch.empty(min(step, matrix.rows), matrix.columns, dtype=dtype)
    for start in range(0, matrix.rows, step):
        rows = slice(start, min(start + step, matrix.rows))
        yield rows, cpu.decode_rows(matrix, rows, dtype, out=buffer[: rows.stop - start])
