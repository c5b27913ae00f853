# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels around a product by other units: rows decoded exactly as the reference's, sums scaled."""

import triton
import triton.language as tl


@triton.jit
def look_up_values(table_ptr, codes, OFFSET: tl.constexpr):
    """float32 table values: by arithmetic where codes are consecutive integers (OFFSET), else from memory."""
    if OFFSET is None:
        values = tl.load(table_ptr + codes)
    else:
        # 2^23 + code, as bits: the conversion of integers is a slow instruction
        values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - OFFSET)
    return values


@triton.jit
def read_zero_point(
    zero_ptr, row, group, words, groups, table_ptr, mask,
    BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """float32 zero points: KIND 1 real ones, stored like scales; 2 packed codes of the grid."""
    if KIND == 1:
        zero = tl.load(zero_ptr.to(tl.pointer_type(SCALE)) + row * groups + group, mask=mask, other=0.0).to(tl.float32)
    else:
        bit = group * BITS
        low = tl.load(zero_ptr + row * words + bit // 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(zero_ptr + row * words + (bit + BITS - 1) // 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
        both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        # Where a code lies in one word, what the second brings is masked away.
        codes = ((both >> (bit % 32).to(tl.uint64)) & ((1 << BITS) - 1)).to(tl.int32)
        zero = look_up_values(table_ptr, codes, OFFSET)
    return zero


@triton.jit
def decode_rows(
    words_ptr, scale_ptr, zero_ptr, table_ptr, index_ptr, out_ptr,
    first, rows, columns, words, groups, zero_words, one_scale,
    BITS: tl.constexpr, BASE3: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr,
    SCALED: tl.constexpr, INDEXED: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Out ``[rows, columns]`` of the rows ``first`` on, or of those in ``index``.

    A unit is a run of codes that lies within a word, or two: these are read once, and spread over its codes. GROUP: its
    columns; 0 where a row is one.
    """
    COUNT: tl.constexpr = 5 if BASE3 else 32 // BITS if 32 % BITS == 0 else 8 if BITS == 3 else 4
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if INDEXED:
        row = tl.load(index_ptr + local, mask=local < rows, other=0)
    else:
        row = (first + local).to(tl.int64)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    WIDE: tl.constexpr = 8 if BASE3 else COUNT
    inner = tl.arange(0, WIDE)[None, None, :]
    column = unit[None, :, None] * COUNT + inner
    inside = (local < rows)[:, None, None] & (column < columns) & (inner < COUNT)
    if BASE3:
        octets = words_ptr.to(tl.pointer_type(tl.uint8))
        known = (local < rows)[:, None] & (unit * COUNT < columns)[None, :]
        octet = tl.load(octets + row[:, None] * (words * 4) + unit[None, :], mask=known, other=0).to(tl.int32)
        power = tl.where(inner == 0, 1, tl.where(inner == 1, 3, tl.where(inner == 2, 9, tl.where(inner == 3, 27, 81))))
        codes = (octet[:, :, None] // power) % 3
    elif 32 % BITS == 0:
        known = (local < rows)[:, None] & (unit < words)[None, :]
        word = tl.load(words_ptr + row[:, None] * words + unit[None, :], mask=known, other=0)
        codes = (word[:, :, None] >> (inner * BITS)) & ((1 << BITS) - 1)
    else:
        bit = unit * (COUNT * BITS)
        known = (local < rows)[:, None] & (unit * COUNT < columns)[None, :]
        place = words_ptr + row[:, None] * words + (bit // 32)[None, :]
        shift = bit % 32
        more = known & (shift + COUNT * BITS > 32)[None, :]
        low = tl.load(place, mask=known, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(place + 1, mask=more, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
        run = ((low | (high << 32)) >> shift[None, :].to(tl.uint64)).to(tl.int32)
        codes = (run[:, :, None] >> (inner * BITS)) & ((1 << BITS) - 1)
    values = look_up_values(table_ptr, codes, OFFSET)
    if SCALED:
        own = row[:, None, None] * (1 - one_scale)
        if WHOLE:  # units lie within groups
            at = unit[None, :, None] * COUNT // GROUP if GROUP > 0 else unit[None, :, None] * 0
            known = (local < rows)[:, None, None] & (unit[None, :, None] * COUNT < columns)
        else:
            at = column // GROUP if GROUP > 0 else column * 0
            known = inside
        if ZERO != 0:
            values -= read_zero_point(
                zero_ptr, own, at, zero_words, groups, table_ptr, known, BITS, ZERO, SCALE, OFFSET
            )
        values *= tl.load(scale_ptr.to(tl.pointer_type(SCALE)) + own * groups + at, mask=known, other=0.0).to(
            tl.float32
        )
    place = local.to(tl.int64)[:, None, None] * columns + column
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rescale(sums_ptr, token_scale_ptr, row_scale_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    """Integer sums of a token times its scale and those of the rows."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + token * rows + row, mask=row < rows, other=0).to(tl.float32)
    scaled = sums * tl.load(row_scale_ptr + row, mask=row < rows, other=0.0) * tl.load(token_scale_ptr + token)
    tl.store(out_ptr + token * rows + row, scaled.to(out_ptr.dtype.element_ty), mask=row < rows)
