# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel that multiplies packed codes as it reads them, for few tokens.

A tile of codes is loaded as it lies in memory, a unit at a time: 16 bits (a chunk), or three words where codes cross
chunks. The i-th codes of all units are one operand of the tensor cores, and the inputs that belong to them the other: a
sum does not depend on its order, so codes never have to be put into theirs. Tiles are ``[slices, rows, units]``: each
warp has slices of its own.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_lowbit.kernels.triton.decode import read_zero_point


@triton.jit
def follow(DEPENDENT: tl.constexpr):
    """Where kernels are launched before the one ahead ends: wait for what it writes, and let the next one come."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


_LINE = tl.constexpr(128)  # bytes


@triton.jit
def prefetch(words_ptr, words, last, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """LENGTH bytes of ROWS rows of so many words, up to the last, to the second-level cache: stale they cannot be."""
    LINES: tl.constexpr = LENGTH // _LINE
    line = tl.arange(0, ROWS * LINES)
    place = words_ptr + tl.minimum(line // LINES, last) * words + line % LINES * (_LINE // 4)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", (place.to(tl.int64),), dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def read_units(words_ptr, row, unit, known, words, WORDS: tl.constexpr, WHOLE: tl.constexpr):
    """Chunks, or the three words of each unit."""
    if WORDS == 0:
        return (load(words_ptr.to(tl.pointer_type(tl.int16)) + row * (words * 2) + unit, known, WHOLE),)
    else:
        place = words_ptr + row * words + unit * WORDS
        return (load(place, known, WHOLE), load(place + 1, known, WHOLE), load(place + 2, known, WHOLE))


@triton.jit
def load(place, known, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(place)
    return tl.load(place, mask=known, other=0)


@triton.jit
def pick_code(units, WORDS: tl.constexpr, BITS: tl.constexpr, INDEX: tl.constexpr):
    """The codes of an index, of all units: for formats without instructions."""
    BIT: tl.constexpr = INDEX * BITS
    if WORDS == 0:
        code = units[0].to(tl.int32) >> BIT
    else:
        code = (units[BIT // 32].to(tl.uint32, bitcast=True) >> (BIT % 32)).to(tl.int32, bitcast=True)
        if BIT % 32 + BITS > 32:
            code |= units[BIT // 32 + 1] << (32 - BIT % 32)
    return code & ((1 << BITS) - 1)


@triton.jit
def read_inputs(place, m, tokens, stride, known, SHAPE: tl.constexpr, SINGLE: tl.constexpr, WHOLE: tl.constexpr):
    """Several inputs at a time, as one integer each. Of a single token all columns are alike: the first is stored."""
    if SINGLE:
        if WHOLE:
            return tl.broadcast_to(tl.load(place), SHAPE)
        return tl.broadcast_to(tl.load(place, mask=known, other=0), SHAPE)
    if WHOLE:
        return tl.load(place + m * stride, mask=m < tokens, other=0)
    return tl.load(place + m * stride, mask=(m < tokens) & known, other=0)


@triton.jit
def finish(
    total, x_scale_ptr, out_ptr, first, tokens, rows, X_SCALE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
):
    """Sums of the slices, times the scales of the tokens, to where they belong."""
    result = tl.sum(total, 0)
    row = first + tl.arange(0, ROWS)[:, None]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, :]
    if X_SCALE:
        result *= tl.load(x_scale_ptr + token, mask=token < tokens, other=0.0)
    place = token.to(tl.int64) * rows + row
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit
def pick(place, first, second, third):
    """One of two or three."""
    if third is not None:
        second = tl.where(place == 2, third, second)
    return tl.where(place == 0, first, second)


@triton.jit
def fused(
    x_ptr, words_ptr, scale_ptr, zero_ptr, words_1, scale_1, zero_1, words_2, scale_2, zero_2,
    table_ptr, grid_ptr, x_scale_ptr, out_ptr, out_1, out_2, tokens, rows, rows_1, rows_2,
    units, words, groups, zero_words, scale_stride, x_stride, step, offset,
    BITS: tl.constexpr, COUNT: tl.constexpr, INSTRUCTIONS: tl.constexpr, OPERANDS: tl.constexpr,
    OFFSET: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr,
    X_SCALE: tl.constexpr, SUMS: tl.constexpr, GROUP_SLICES: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
    WHOLE: tl.constexpr, SINGLE: tl.constexpr, DEPENDENT: tl.constexpr, WORDS: tl.constexpr,
    SLICES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
):  # fmt: skip
    """Inputs ``[tokens, columns]`` times packed codes: ``[tokens, rows]``, of one matrix or of up to three.

    The others differ from the first in their rows alone; None where there are none.

    Slices lie within one group of weights (GROUP_SLICES of them make one; 0: a row is a group), or have PARTS of them,
    so that scales multiply float32 sums and not weights; and so do ``step``, ``offset`` and zero points, the latter two
    times the sum of the inputs (SUMS). Or slices have several groups (SCALED, that many), and weights are multiplied by
    their scales as they are unpacked, and rounded. ``table_ptr`` is of the inputs' type, ``grid_ptr`` float32. WHOLE:
    rows end with a tile. PREFETCHED: so many tiles are fetched while the kernel ahead still runs.
    """
    PER_LOAD: tl.constexpr = min(COUNT, 4)
    LOADS: tl.constexpr = COUNT // PER_LOAD
    TYPE: tl.constexpr = x_ptr.dtype.element_ty
    SHAPE: tl.constexpr = [SLICES, UNITS, TOKENS]
    block = tl.program_id(0)
    if words_1 is not None:
        second = tl.cdiv(rows, ROWS)
        third = second + tl.cdiv(rows_1, ROWS)
        which = (block >= second).to(tl.int32) + (block >= third)
        block -= pick(which, 0, second, third)
        words_ptr, scale_ptr = pick(which, words_ptr, words_1, words_2), pick(which, scale_ptr, scale_1, scale_2)
        out_ptr, rows = pick(which, out_ptr, out_1, out_2), pick(which, rows, rows_1, rows_2)
        if zero_ptr is not None:
            zero_ptr = pick(which, zero_ptr, zero_1, zero_2)
    first = block.to(tl.int64) * ROWS
    s = tl.arange(0, SLICES)[:, None, None]
    r = tl.minimum(tl.arange(0, ROWS), (rows - 1 - first).to(tl.int32))[None, :, None]  # past the last: not stored
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    across = tl.arange(0, UNITS)[None, None, :]
    down = tl.arange(0, UNITS)[None, :, None]
    words_ptr += first * words
    if PREFETCHED > 0:
        prefetch(words_ptr, words, (rows - 1 - first).to(tl.int32), ROWS, PREFETCHED * SLICES * UNITS * 2)
    follow(DEPENDENT)
    inputs_ptr = x_ptr.to(tl.pointer_type(tl.int64 if PER_LOAD == 4 else tl.int32))
    scales_ptr = scale_ptr.to(tl.pointer_type(SCALE)) + first * scale_stride
    ones = tl.full([SLICES, ROWS, UNITS], 1.0, tl.float32).to(TYPE)
    total = tl.zeros([SLICES, ROWS, TOKENS], tl.float32)
    sums = tl.zeros([SLICES, ROWS, TOKENS], tl.float32)
    for tile in tl.range(0, tl.cdiv(units, SLICES * UNITS), num_stages=STAGES):
        piece = tile * SLICES + s
        unit = piece * UNITS
        codes = read_units(words_ptr, r, unit + across, unit + across < units, words, WORDS, WHOLE)
        operands = codes
        if SCALED > 0:
            group = piece * SCALED + tl.arange(0, SCALED)[None, None, :]
            # Only loads and what is computed of them alone are put where operands have to be without another copy.
            scale = load(scales_ptr + r * scale_stride + group, group < groups, WHOLE)
            scale = tl.broadcast_to(scale[:, :, :, None], [SLICES, ROWS, SCALED, UNITS // SCALED])
            scale = tl.reshape(scale, [SLICES, ROWS, UNITS])
            operands = codes + (scale.to(tl.int16, bitcast=True),)
        if INSTRUCTIONS is not None:
            values = tl.inline_asm_elementwise(
                INSTRUCTIONS, OPERANDS, operands, dtype=(tl.int16,) * COUNT, is_pure=True, pack=2
            )
        for part in tl.static_range(PARTS):
            if GROUP_SLICES > 0:
                dots = tl.zeros([SLICES, ROWS, TOKENS], tl.float32)
                sums = tl.zeros([SLICES, ROWS, TOKENS], tl.float32)
            else:
                dots = total
            for j in tl.static_range(LOADS):
                place = inputs_ptr + (unit + down) * LOADS + j
                if PARTS > 1:  # the others' inputs are zeros
                    known = (unit + down < units) & (down // (UNITS // PARTS) == part)
                else:
                    known = unit + down < units
                packed = read_inputs(place, m, tokens, x_stride, known, SHAPE, SINGLE, WHOLE and PARTS == 1)
                for i in tl.static_range(PER_LOAD):
                    if INSTRUCTIONS is None:
                        value = tl.load(table_ptr + pick_code(codes, WORDS, BITS, j * PER_LOAD + i))
                        if SCALED > 0:
                            value *= scale
                    else:
                        value = values[j * PER_LOAD + i].to(TYPE, bitcast=True)
                    x = (packed >> (16 * i)).to(tl.int16).to(TYPE, bitcast=True)
                    dots = tl.dot(value, x, dots)
                    if SUMS:
                        sums = tl.dot(ones, x, sums)
            if GROUP_SLICES > 0:
                group = piece * PARTS + part if PARTS > 1 else piece // GROUP_SLICES
                group = group if WHOLE else tl.minimum(group, groups - 1)
                if SUMS:
                    dots = dots * step + sums * offset
                if ZERO != 0:
                    dots -= sums * read_zero_point(
                        zero_ptr, (first + r) * (scale_stride > 0), group, zero_words, groups, grid_ptr, group < groups,
                        BITS, ZERO, SCALE, OFFSET,
                    )  # fmt: skip
                total += dots * tl.load(scales_ptr + r * scale_stride + group).to(tl.float32)
            else:
                total = dots
    if GROUP_SLICES == 0 and SCALED == 0:
        if SUMS:
            total = total * step + sums * offset
        if ZERO != 0:
            total -= sums * read_zero_point(
                zero_ptr, (first + r) * (scale_stride > 0), s * 0, zero_words, groups, grid_ptr, s >= 0,
                BITS, ZERO, SCALE, OFFSET,
            )  # fmt: skip
        total *= tl.load(scales_ptr + r * scale_stride).to(tl.float32)
    finish(total, x_scale_ptr, out_ptr, first, tokens, rows, X_SCALE, ROWS, TOKENS)
