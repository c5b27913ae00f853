"""Products with many tokens: some rows are decoded into a buffer that stays in the cache, torch multiplies them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor
from hf_lowbit.formats.packed import scales
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


def tiled_codes_product(codes: Tensor, scale: Tensor, packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """int8 codes ``[tokens, columns]`` with scales ``[tokens, 1]`` times 8-bit integer rows of one scale each.

    Stored bytes are value + 128; turned into int8 a tile at a time, torch multiplies them as integers, exactly.
    Results ``[tokens, rows]`` in ``dtype``.
    """
    stored, row_scale = packed.weight.view(torch.int8), scales(packed).reshape(-1)
    rows, step = stored.shape[0], max(16, _TILE_BYTES // packed.columns)
    row_scale = row_scale.expand(rows)
    buffer = torch.empty(min(step, rows), packed.columns, dtype=torch.int8)
    result = torch.empty(codes.shape[0], rows, dtype=dtype)
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        tile = torch.bitwise_xor(stored[some, : packed.columns], -128, out=buffer[: some.stop - start])
        result[:, some] = torch._int_mm(codes, tile.t()).float().mul_(scale).mul_(row_scale[some])
    return result


def _tiles(matrix: cpu.Matrix, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their decoded rows, in one buffer that the next tile overwrites."""
    step = max(16, _TILE_BYTES // (matrix.columns * dtype.itemsize))
    buffer = torch.empty(min(step, matrix.rows), matrix.columns, dtype=dtype)
    for start in range(0, matrix.rows, step):
        rows = slice(start, min(start + step, matrix.rows))
        yield rows, cpu.decode_rows(matrix, rows, dtype, out=buffer[: rows.stop - start])
