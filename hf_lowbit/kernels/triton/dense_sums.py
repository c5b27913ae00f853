# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel that adds what parts of a tile's columns summed to, always in the same order."""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton.fused import follow


@triton.jit(do_not_specialize=("tokens", "whole", "rest", "parts", "token_tiles"))
def add_tiles(
    sums_ptr, out_ptr, tokens, rows, whole, rest, parts, token_tiles,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """float32 ``[parts, rest, ROWS, TOKENS]`` (FLIP), or with the last two swapped, to tiles from ``whole`` on.

    Tiles are counted along the tokens first; a program takes a square of BLOCK of one.
    """
    follow(DEPENDENT)
    ACROSS: tl.constexpr = TOKENS if FLIP else ROWS
    index, square = tl.program_id(0), tl.program_id(1)
    down = square // (ACROSS // BLOCK) * BLOCK + tl.arange(0, BLOCK)[:, None]
    across = square % (ACROSS // BLOCK) * BLOCK + tl.arange(0, BLOCK)[None, :]
    sums_ptr += index.to(tl.int64) * (ROWS * TOKENS) + down * ACROSS + across
    total = tl.load(sums_ptr)
    for part in range(1, parts):
        total += tl.load(sums_ptr + part * rest.to(tl.int64) * (ROWS * TOKENS))
    tile = whole + index
    first_token, first_row = tile % token_tiles * TOKENS, tile // token_tiles * ROWS
    y = total.to(out_ptr.dtype.element_ty)
    if FLIP:
        token = first_token + square % (ACROSS // BLOCK) * BLOCK + tl.arange(0, BLOCK)[:, None]
        row = first_row + square // (ACROSS // BLOCK) * BLOCK + tl.arange(0, BLOCK)[None, :]
        y = tl.trans(y)
    else:
        token, row = first_token + down, first_row + across
    tl.store(out_ptr + token.to(tl.int64) * rows + row, y, mask=(token < tokens) & (row < rows))
