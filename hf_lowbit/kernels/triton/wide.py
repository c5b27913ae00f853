# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel for some hundred tokens: weights decoded in registers, where Hopper's tensor cores take them.

A block multiplies many rows by all its tokens, so that codes are unpacked once and inputs are read seldom. Inputs are
put into the order of the codes first: the i-th codes of all chunks meet the i-th inputs. Where rows are few, blocks
take parts of their columns, whose sums another kernel adds, always in the same order.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton.fused import follow, pick_code, read_units


@triton.jit
def arrange(x_ptr, out_ptr, tokens, chunks, DEPENDENT: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """x ``[tokens, chunks, COUNT]`` to ``[COUNT, tokens, chunks]``."""
    follow(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i = tl.arange(0, COUNT)[None, :]
    x = tl.load(x_ptr + (token * chunks + chunk) * COUNT + i, mask=chunk < chunks)
    tl.store(out_ptr + (i * tokens.to(tl.int64) + token) * chunks + chunk, x, mask=chunk < chunks)


@triton.jit
def wide(
    x_ptr, words_ptr, scale_ptr, table_ptr, out_ptr, tokens, rows, chunks, words, groups,
    BITS: tl.constexpr, COUNT: tl.constexpr, INSTRUCTIONS: tl.constexpr, OPERANDS: tl.constexpr,
    GROUP_SLICES: tl.constexpr, DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Arranged inputs ``[COUNT, tokens, chunks]`` times packed codes: ``[PARTS, tokens, rows]``.

    Slices of CHUNKS lie within one group of weights and make up rows, or PARTS of them. Weights times scales are
    rounded.
    """
    follow(DEPENDENT)
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.minimum(tl.arange(0, ROWS), (rows - 1 - first).to(tl.int32))[:, None]  # past the last: not stored
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :]
    across = tl.arange(0, CHUNKS)[None, :]
    down = tl.arange(0, CHUNKS)[:, None]
    words_ptr += first * words
    scale_ptr = scale_ptr.to(tl.pointer_type(TYPE)) + (first + r) * groups
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    begin, end = 0, chunks // CHUNKS
    if PARTS > 1:
        part = tl.program_id(2)
        begin = part * tl.cdiv(end, PARTS)
        end = tl.minimum(begin + tl.cdiv(end, PARTS), end)
        out_ptr += part * tokens.to(tl.int64) * rows
    for slice in tl.range(begin, end, num_stages=STAGES):
        chunk = slice * CHUNKS
        codes = read_units(words_ptr, r, chunk + across, across >= 0, words, 0, True)
        scale = tl.load(scale_ptr + (slice // GROUP_SLICES if GROUP_SLICES > 0 else 0))
        scale = tl.broadcast_to(scale, [ROWS, CHUNKS])
        if INSTRUCTIONS is not None:
            values = tl.inline_asm_elementwise(
                INSTRUCTIONS, OPERANDS, codes + (scale.to(tl.int16, bitcast=True),), dtype=(tl.int16,) * COUNT,
                is_pure=True, pack=2,
            )  # fmt: skip
        for i in tl.static_range(COUNT):
            if INSTRUCTIONS is None:
                value = tl.load(table_ptr + pick_code(codes, 0, BITS, i)) * scale
            else:
                value = values[i].to(TYPE, bitcast=True)
            place = x_ptr + (i * tokens.to(tl.int64) + token) * chunks + (chunk + down)
            total = tl.dot(value, tl.load(place, mask=token < tokens, other=0.0), total)
    row = first + tl.arange(0, ROWS)[:, None]
    tl.store(out_ptr + token * rows + row, total.to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit
def add_parts(parts_ptr, out_ptr, size, DEPENDENT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 ``[PARTS, size]`` to their sums."""
    follow(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts_ptr + at, mask=at < size)
    for i in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + i * size.to(tl.int64) + at, mask=at < size)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
