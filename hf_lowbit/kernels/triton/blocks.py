"""Block shapes of the Triton kernels, as measured best on an H200 (benchmarks/speed_gpu.py): the one table of them."""

from __future__ import annotations

from hf_lowbit.kernels.triton.matrix import Tiling
from hf_lowbit.kernels.triton.unpack import words_of_unit

_MANY_ROWS = 8192  # enough blocks to fill the GPU whatever their shape

# The most tokens for which decoding in registers beats decoding to memory and a product of floats, by width: the
# narrower, the more inputs there are to each byte.
FUSED_TOKENS = {1: 16, 2: 16, 3: 8, 4: 64, 6: 8, 8: 64}

DIGIT_TOKENS = 2  # as digits in the tensor cores for integers
SLICE_BYTES = 64  # of a row: a load of 16 bytes for each of four threads
DIGIT_PARTS = 16  # blocks that a token's digits are computed by

WIDE_ROWS, WIDE_STAGES, WIDE_WARPS = 128, 3, 8  # of the kernel for some hundred tokens
DECODED_ROWS, DECODED_CODES = 1, 4096
RESCALED = 2048


def fused_block(tokens: int, rows: int, bits: int, tiling: Tiling) -> dict[str, int]:
    """Slices, rows and tokens of a block, stages and warps."""
    many = rows >= _MANY_ROWS
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
    if tokens > 8:
        return _block(4, 64, 16, 3, 4) if many else _block(8, 32, 16, 3, 4)
    short = tiling.units == 16
    if many:
        return _block(4, 32, 8, 3, 4) if bits in (2, 8) else _block(8, 16 if short and tokens == 1 else 32, 8, 3, 4)
    if bits == 4:
        return _block(16, 16, 8, 3, 4) if short else _block(8, 32, 8, 3, 4)
    return _block(8, 16, 8, 4, 4) if bits == 8 else _block(8, 32, 8, 3, 8)


def has_digits(tokens: int, bits: int, rows: int, row_slices: int, group_slices: int) -> bool:
    """Whether the kernel for integers is the fastest, and its blocks divide rows and hold groups of so many slices."""
    many = rows >= _MANY_ROWS
    if tokens > DIGIT_TOKENS or not (bits == 4 or (bits == 8 and many)) or not (many or tokens == 1):
        return False
    shape = digits_block(tokens, rows)
    whole = rows % shape["ROWS"] == 0 and row_slices % (shape["SLICES"] * shape["BUFFERS"]) == 0
    return whole and (group_slices == row_slices or shape["SLICES"] % group_slices == 0)


def digits_block(tokens: int, rows: int) -> dict[str, int]:
    """Slices and rows of a block, tiles that are read ahead, and warps."""
    slices, height, buffers, warps = (
        (16, 16, 1, 16) if rows < _MANY_ROWS else (8, 32, 1, 4) if tokens == 1 else (4, 32, 2, 4)
    )
    return {"SLICES": slices, "ROWS": height, "BUFFERS": buffers, "num_warps": warps}


def is_wide(tokens: int, bits: int, rows: int, units: int) -> bool:
    """Whether the kernel for some hundred tokens is the fastest: there have to be blocks for most of the GPU.

    Where slices are short, their products wait for each other.
    """
    short = units < 32
    least = 200 if short or (tokens <= 64 and bits != 4) else 100
    return 32 < tokens <= (128 if short else 256) and rows // WIDE_ROWS >= least


def wide_tokens(tokens: int) -> int:
    """Of a block."""
    return 64 if tokens <= 64 else 128


def _block(slices: int, rows: int, tokens: int, stages: int, warps: int) -> dict[str, int]:
    return {"SLICES": slices, "ROWS": rows, "TOKENS": tokens, "STAGES": stages, "num_warps": warps}
