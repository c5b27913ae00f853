"""Launching the Triton kernels: grids, block shapes and arguments."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.kernels.triton.decode import decode_rows, rescale
from hf_lowbit.kernels.triton.device import interpreted
from hf_lowbit.kernels.triton.fused import fused
from hf_lowbit.kernels.triton.matrix import Matrix
from hf_lowbit.kernels.triton.quantize import quantize
from hf_lowbit.kernels.triton.unpack import CHUNK_BITS

_SCALES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
_ALIGNMENT = 16
_DECODED_ROWS, _DECODED_CODES, _RESCALED = 4, 512, 2048  # of a block


def launch_fused(x: Tensor, matrix: Matrix, x_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x ``[tokens, columns]`` of a 16-bit type to ``[tokens, rows]`` in ``dtype``, times ``x_scale`` ``[tokens]``."""
    layout, packed = matrix.layout, matrix.packed
    tiling, unpacking = layout.tiling, layout.unpacking
    assert tiling is not None
    if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT:
        x = x.clone(memory_format=torch.contiguous_format)
    tokens, rows = x.shape[0], matrix.rows
    shape = block_of(tokens, matrix)
    out = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    words, groups = packed.weight.shape[1], packed.scale.shape[1]
    count = CHUNK_BITS // packed.spec.bits
    chunks = matrix.columns // count
    dependent = _overlaps(x.device)
    grid = (triton.cdiv(rows, shape["ROWS"]), triton.cdiv(tokens, shape["TOKENS"]))
    arguments = (
        x, packed.weight, packed.scale, packed.zero_point, matrix.table(x.dtype), matrix.table(torch.float32), x_scale,
        out, tokens, rows, chunks, words, groups, _zero_words(matrix), 0 if packed.scale.shape[0] < rows else groups,
        matrix.columns // min(4, count), unpacking.step, unpacking.offset,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "BITS": packed.spec.bits, "COUNT": count, "INSTRUCTIONS": unpacking.instructions,
        "OPERANDS": "=r," * count + "r", "OFFSET": layout.offset,
        "ZERO": layout.zero_kind, "SCALE": _SCALES[packed.spec.scale_dtype], "X_SCALE": x_scale is not None,
        "WHOLE": chunks % (shape["SLICES"] * tiling.chunks) == 0, "SINGLE": tokens == 1, "DEPENDENT": dependent,
        "SUMS": unpacking.offset != 0 or layout.zero_kind != 0, "GROUP_SLICES": tiling.group_slices,
        "PARTS": tiling.parts, "CHUNKS": tiling.chunks, **shape,
    }  # fmt: skip
    if dependent:
        constants["launch_pdl"] = True
    with _on(x):
        fused[grid](*arguments, **constants)
    return out


def launch_decode(
    matrix: Matrix, first: int, index: Tensor | None, out: Tensor, *, table: Tensor | None = None, scaled: bool = True
) -> None:
    """Decoded rows from ``first`` on, or those of ``index``, into ``out`` ``[n, columns]``.

    Args:
        table: float32 values to take instead of the format's.
        scaled: multiply by scales, less zero points; False leaves values of the table.
    """
    layout, packed = matrix.layout, matrix.packed
    spec, groups, rows = packed.spec, packed.scale.shape[1], out.shape[0]
    group = matrix.columns // groups
    base3 = spec.packing == "base3"
    codes = 5 if base3 else 32 // spec.bits if 32 % spec.bits == 0 else 32
    units = triton.next_power_of_2(max(1, _DECODED_CODES // codes))
    grid = (triton.cdiv(rows, _DECODED_ROWS), triton.cdiv(matrix.columns, units * codes))
    with _on(out):
        decode_rows[grid](
            packed.weight, packed.scale, packed.zero_point, matrix.table(torch.float32) if table is None else table,
            index, out, first, rows, matrix.columns, packed.weight.shape[1], groups, group, _zero_words(matrix),
            int(packed.scale.shape[0] < matrix.rows),
            BITS=spec.bits, BASE3=base3, OFFSET=layout.offset if table is None else None, ZERO=layout.zero_kind,
            SCALE=_SCALES[spec.scale_dtype], SCALED=scaled, INDEXED=index is not None, WHOLE=group % codes == 0,
            ROWS=_DECODED_ROWS, UNITS=units,
        )  # fmt: skip


def launch_quantize(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """int8 codes of x ``[m, columns]`` and float32 scales ``[m, 1]``; the largest magnitude gets the code ``limit``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], 1, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    with _on(x):
        quantize[x.shape[0],](
            x, codes, scale, x.shape[1], x.stride(0), limit, BLOCK=block, num_warps=min(8, max(1, block // 512))
        )
    return codes, scale


def launch_rescale(sums: Tensor, token_scale: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 sums ``[m, rows]`` times float32 scales ``[m, 1]`` and ``[rows, 1]``, in ``dtype``, in one pass."""
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    grid = (sums.shape[0], triton.cdiv(sums.shape[1], _RESCALED))
    with _on(out):
        rescale[grid](sums, token_scale.contiguous(), row_scale.contiguous(), out, sums.shape[1], BLOCK=_RESCALED)
    return out


def block_of(tokens: int, matrix: Matrix) -> dict[str, int]:
    """Block shape, stages and warps, as benchmarks/speed_gpu.py measures them best on an H200."""
    assert matrix.layout.tiling is not None
    bits, many, short = matrix.packed.spec.bits, matrix.rows >= 8192, matrix.layout.tiling.chunks == 16
    if tokens > 16:
        return _block(4, 32, 32, 3, 4)
    if tokens > 8:
        return _block(4, 64, 16, 3, 4) if many else _block(8, 32, 16, 3, 4)
    if many:
        return _block(4, 32, 8, 3, 4) if bits in (2, 8) else _block(8, 16 if short and tokens == 1 else 32, 8, 3, 4)
    if bits == 4:
        return _block(16, 16, 8, 3, 4) if short else _block(8, 32, 8, 3, 4)
    return _block(8, 16, 8, 4, 4) if bits == 8 else _block(8, 32, 8, 3, 8)


def _block(slices: int, rows: int, tokens: int, stages: int, warps: int) -> dict[str, int]:
    return {"SLICES": slices, "ROWS": rows, "TOKENS": tokens, "STAGES": stages, "num_warps": warps}


def _zero_words(matrix: Matrix) -> int:
    return 0 if matrix.packed.zero_point is None else matrix.packed.zero_point.shape[1]


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead of it ends."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _Nowhere()


class _Nowhere:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
