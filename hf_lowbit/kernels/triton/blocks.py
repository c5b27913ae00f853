"""The one table of block shapes of the Triton kernels, measured best on an H200 or H100 (benchmarks/speed_gpu.py)."""

from __future__ import annotations

from hf_lowbit.kernels.triton.matrix import Tiling
from hf_lowbit.kernels.triton.unpack import words_of_unit

_MANY_ROWS = 8192  # enough blocks to fill the GPU whatever their shape
_MOST_ROWS = 24576  # several rounds of blocks: the fewer and smaller, the less the last one leaves idle
_LONG_UNITS = 3072  # of a row

# The most tokens for which decoding in registers beats decoding to memory and a product of floats, by width: the
# narrower, the more inputs there are to each byte.
FUSED_TOKENS = {1: 16, 2: 16, 3: 8, 4: 64, 6: 8, 8: 64}

DIGIT_TOKENS = 2  # as digits in the tensor cores for integers
SLICE_BYTES = 64  # of a row: a load of 16 bytes for each of four threads
_FEW_ROWS_SLICES = 32  # of rows where these are few: shorter and longer ones take the fused kernel less time
DIGIT_PARTS, DIGIT_WARPS = 16, 16  # blocks that a token's digits are computed by, and their warps
# Bytes of matrices from which digits save the GPU more than their launch more costs: where each launch takes Python 10
# microseconds and more; and in a CUDA graph, where one launch of the fused kernel multiplies several matrices.
EAGER_DIGITS_BYTES = 1 << 26
JOINT_DIGITS_BYTES = 1 << 25

WIDE_ROWS, WIDE_STAGES, WIDE_WARPS = 128, 3, 8  # of the kernel for some hundred tokens
_FEWEST_BLOCKS, _MOST_BLOCKS, _FEWEST_SLICES = 100, 264, 14
ADDED = 1024
DECODED_ROWS, DECODED_CODES = 1, 4096
# Rows that are decoded at a time where many tokens are multiplied: fewer, and products are slower; more, and they leave
# the cache. From so many tokens on, the GPU takes longer for a tile's product than Python for what lets the next one be
# decoded meanwhile.
TILE_ROWS, OVERLAPPED_TOKENS = 4096, 1024
RESCALED = 2048


def fused_block(tokens: int, rows: int, bits: int, tiling: Tiling, units: int, plain: bool) -> dict[str, int]:
    """Slices, rows and tokens of a block, stages, tiles that are prefetched, warps, and the most registers.

    Args:
        units: of a row.
        plain: integers without zero points.
    """
    many, short, long = rows >= _MANY_ROWS, tiling.units == 16, units >= _LONG_UNITS
    if words_of_unit(bits):
        return _block(4, 32 if many or tokens > 1 else 16, 8, 1 if bits == 3 and tokens > 1 else 2, 4)
    if tiling.scales_weights:
        if tokens > 1:
            return _block(4, 64 if many else 32, 8 if tokens <= 8 else 16, 2, 4)
        return _block(4, 32, 8, 3, 4)
    if bits == 1 and tokens > 8:  # chunks have inputs enough to fill the shared memory
        return _block(4, 32, 16, 2, 4)
    if tokens > 16:
        return _block(4, 32, 32, 3, 4)
    if bits == 4 and tokens > 1 and not short:
        if tokens > 8 and many:
            return _block(2, 64, 16, 3, 2, 2) if rows >= _MOST_ROWS else _block(4, 32, 16, 3, 4, 2, 128)
        if tokens > 8:
            return _block(8, 32, 16, 3, 8, 2, 168) if tiling.group_slices and not long else _block(8, 32, 16, 4, 4, 2)
        return _block(4, 32, 8, 3, 4, 1) if many else _block(8, 32, 8, 4, 4)
    if tokens > 8:
        return _block(4, 64, 16, 3, 4) if many else _block(8, 32, 16, 3, 4)
    if many:
        return _block(4, 32, 8, 3, 4) if bits in (2, 8) else _block(8, 16 if short and tokens == 1 else 32, 8, 3, 4)
    if bits == 4 and plain and not short:
        return _block(16, 16, 8, 3, 8, 1) if tiling.group_slices and long else _block(8, 16, 8, 4, 4, 1)
    if bits == 4:
        return _block(16, 16, 8, 3, 4) if short else _block(8, 32, 8, 3, 4)
    return _block(8, 16, 8, 4, 4) if bits == 8 else _block(8, 32, 8, 3, 8)


def has_digits(tokens: int, bits: int, rows: int, row_slices: int, group_slices: int) -> bool:
    """Whether the kernel for integers is the fastest, and its blocks divide rows and hold groups of so many slices."""
    many = rows >= _MANY_ROWS
    if tokens > DIGIT_TOKENS or not (bits == 4 or (bits == 8 and many)) or not (many or tokens == 1):
        return False
    if not many and row_slices != _FEW_ROWS_SLICES:
        return False
    shape = digits_block(rows)
    whole = rows % shape["ROWS"] == 0 and row_slices % shape["SLICES"] == 0
    long = row_slices >= shape["SLICES"] * shape["AHEAD"]
    return whole and long and (group_slices == row_slices or shape["SLICES"] % group_slices == 0)


def digits_block(rows: int) -> dict[str, int]:
    """Slices and rows of a block, tiles that are read ahead, warps, and the most registers: of few rows, no more than
    let the next kernel's blocks read their weights beside this one's.
    """
    if rows < _MANY_ROWS:
        return {"SLICES": 16, "ROWS": 16, "AHEAD": 1, "num_warps": 8, "maxnreg": 80}
    return {"SLICES": 4, "ROWS": 32, "AHEAD": 2, "num_warps": 4}


def is_wide(tokens: int, bits: int, rows: int, units: int, slices: int) -> bool:
    """Whether the kernel for some hundred tokens is the fastest: there have to be blocks for most of the GPU.

    Where slices are short, their products wait for each other.
    """
    short = units < 32
    if bits == 4 and not short:
        enough = _wide_blocks(tokens, rows) * wide_parts(tokens, rows, bits, units, slices) >= _FEWEST_BLOCKS
    else:
        enough = rows // WIDE_ROWS >= (200 if short or tokens <= 64 else _FEWEST_BLOCKS)
    return 32 < tokens <= (128 if short else 256) and enough


def wide_parts(tokens: int, rows: int, bits: int, units: int, slices: int) -> int:
    """Of the columns, so that there are two blocks for each multiprocessor, but none with too few slices."""
    parts = 1
    if bits == 4 and units == 32:
        while 2 * parts * _wide_blocks(tokens, rows) <= _MOST_BLOCKS and slices // (2 * parts) >= _FEWEST_SLICES:
            parts *= 2
    return parts


def _wide_blocks(tokens: int, rows: int) -> int:
    return rows // WIDE_ROWS * -(-tokens // wide_tokens(tokens))


def wide_tokens(tokens: int) -> int:
    """Of a block."""
    return 64 if tokens <= 64 else 128


def _block(
    slices: int, rows: int, tokens: int, stages: int, warps: int, prefetched: int = 0, registers: int | None = None
) -> dict[str, int]:
    shape = {"SLICES": slices, "ROWS": rows, "TOKENS": tokens, "STAGES": stages, "PREFETCHED": prefetched}
    return {**shape, "num_warps": warps, **({} if registers is None else {"maxnreg": registers})}
