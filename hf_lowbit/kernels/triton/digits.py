# mypy: disable-error-code="no-untyped-def,assignment"
"""The Triton kernels for one or two tokens: integer weights times inputs as digits, in the tensor cores for integers.

A product with one token leaves seven of the tensor cores' eight columns empty. So an input is written as an integer of
31 bits times a power of two (one for the token), and that as four signed digits to the base 256, each in a column of
its own: as exact as float32 sums of inputs in 16 bits are. Weights become bytes in half the instructions that floats
take, with nothing to correct afterwards: code - 2^(bits - 1), times 2^(8 - bits), is the code's bits moved to the top
of a byte whose highest bit is flipped. Sums of products within a group are exact integers.

Weights do not depend on the kernels before: they are on their way while the inputs' digits are computed. In the loop
some tiles are always on their way, too: left to itself, the compiler asks for one when that before is multiplied.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from hf_lowbit.kernels.triton.fused import follow

DIGITS = tl.constexpr(4)
_COLUMNS = tl.constexpr(8)  # of a product in the tensor cores
_HIGHEST_BITS = tl.constexpr(-0x7F7F7F80)  # of four bytes
_BALANCE = tl.constexpr(0x00808080)  # makes the lower three of an integer's bytes signed digits


@triton.jit
def to_digits(
    x_ptr, digits_ptr, columns,
    PIECES: tl.constexpr, ALL: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """x ``[tokens, columns]`` to bytes ``[tokens, digits, PIECES, columns / PIECES]``, and a float32 factor per token.

    The factors lie behind the digits. What belongs to the i-th codes of all bytes of weights is the i-th piece. EARLY:
    the kernel that follows may read weights while the one ahead of this still runs.
    """
    if EARLY:
        gdc_launch_dependents()
    follow(DEPENDENT)
    token = tl.program_id(0)
    x_ptr += token.to(tl.int64) * columns
    every = tl.arange(0, ALL)
    x = tl.load(x_ptr + every, mask=every < columns, other=0.0).to(tl.float32)
    exponent = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0) >> 23  # as integers: NaN is the largest
    known = tl.minimum(tl.maximum(exponent, 30), 254)
    factor = ((283 - known) << 23).to(tl.float32, bitcast=True)  # below 2^30 with it
    octets = columns // PIECES
    octet = tl.program_id(1) * PART + tl.arange(0, PART)[None, :]
    piece = tl.arange(0, PIECES)[:, None]
    x = tl.load(x_ptr + octet * PIECES + piece, mask=octet < octets, other=0.0).to(tl.float32)
    digits = ((x * factor).to(tl.int32) + _BALANCE) ^ _BALANCE
    place = digits_ptr + token * DIGITS * columns + piece * octets + octet
    for i in tl.static_range(DIGITS):
        tl.store(place + i * columns, (digits >> (8 * i)).to(tl.int8), mask=octet < octets)
    if tl.program_id(1) == 0:
        back = ((known - 29) << 23).to(tl.float32, bitcast=True)
        factors_ptr = (digits_ptr + TOKENS * DIGITS * columns).to(tl.pointer_type(tl.float32))
        tl.store(factors_ptr + token, tl.where(exponent == 255, float("nan"), back))


@triton.jit
def bytes_of(words, SLICES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [SLICES, ROWS, UNITS])


@triton.jit
def read_tile(words_ptr, scale_ptr, places, scales):
    return tl.load(words_ptr + places), tl.load(tl.max_contiguous(scale_ptr + scales, [1, 1, 1, 1]))


@triton.jit
def add_product(
    total, tile, place, ROW: tl.constexpr, BITS: tl.constexpr, HOW: tl.constexpr,
    SLICES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """A tile's, times scales. Sums do not depend on their order: every thread multiplies what it has read.

    HOW: instructions that make bytes of words, and their operands; None where these are interpreted.
    """
    RUN: tl.constexpr = UNITS // 32
    words = tl.reshape(tl.permute(tile[0], (1, 2, 0, 3)), [SLICES, ROWS, 4, RUN, 2])
    words = tl.reshape(tl.permute(words, (0, 1, 3, 2, 4)), [SLICES, ROWS, UNITS // 4])
    dots = tl.zeros([SLICES, ROWS, _COLUMNS], tl.int32)
    if HOW is not None:
        octets = tl.inline_asm_elementwise(
            HOW[0], HOW[1], (words,), dtype=(tl.int32,) * (8 // BITS), is_pure=True, pack=1
        )
    for i in tl.static_range(8 // BITS):
        x = tl.reshape(tl.permute(tl.load(place + i * ROW), (1, 0, 2)), [SLICES, _COLUMNS, 4, RUN, 8])
        x = tl.reshape(tl.permute(x, (0, 3, 2, 4, 1)), [SLICES, UNITS, _COLUMNS])
        if HOW is not None:
            values = octets[i]
        else:
            values = ((words << (8 - BITS * (i + 1))) & ~(((1 << (8 - BITS)) - 1) * 0x01010101)) ^ _HIGHEST_BITS
        dots = tl.dot(bytes_of(values, SLICES, ROWS, UNITS), x, dots, out_dtype=tl.int32)
    scale = tl.reshape(tl.permute(tile[1], (2, 3, 1, 0)), [SLICES, ROWS, 4, 1])
    scale = tl.reshape(tl.broadcast_to(scale, [SLICES, ROWS, 4, 2]), [SLICES, ROWS, _COLUMNS])
    return total + dots.to(tl.float32) * scale.to(tl.float32)


@triton.jit
def multiply_digits(
    digits_ptr, words_ptr, scale_ptr, out_ptr, rows,
    ROW: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, HOW: tl.constexpr, SCALE: tl.constexpr,
    GROUP_SLICES: tl.constexpr, TOKENS: tl.constexpr, DEPENDENT: tl.constexpr,
    SLICES: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Digits of :func:`to_digits` times packed codes, rows of ROW bytes: ``[tokens, rows]``.

    Slices are of UNITS bytes, within one group of weights; AHEAD tiles are read before they are multiplied. The axes of
    what is loaded are in the order in which the compiler hands them to threads, then warps: as the tensor cores want
    them, so that nothing goes through shared memory.
    """
    TILE: tl.constexpr = SLICES * UNITS
    STEP: tl.constexpr = SLICES // GROUP_SLICES  # groups
    LAST: tl.constexpr = ROW // TILE - AHEAD  # tiles that are read before the loop ends
    first = tl.program_id(0).to(tl.int64) * ROWS
    g = tl.arange(0, 8)[:, None, None, None]
    s = tl.arange(0, SLICES)[None, :, None, None]
    h = tl.arange(0, ROWS // 8)[None, None, :, None]
    places = (h * 8 + g) * (ROW // 4) + s * (UNITS // 4) + tl.arange(0, UNITS // 4)[None, None, None, :]
    words_ptr += first * (ROW // 4)
    column = tl.arange(0, _COLUMNS)[:, None, None]
    column = column % DIGITS if TOKENS == 1 else column  # the others are not stored
    inputs = (
        column * (ROW * 8 // BITS) + tl.arange(0, SLICES)[None, :, None] * UNITS + tl.arange(0, UNITS)[None, None, :]
    )
    q = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    s = tl.arange(0, SLICES)[None, None, :, None]
    h = tl.arange(0, ROWS // 8)[None, None, None, :]
    scales = (h * 8 + g) * GROUPS + s // GROUP_SLICES + q * 0
    scale_ptr = scale_ptr.to(tl.pointer_type(SCALE)) + first * GROUPS
    total = tl.zeros([SLICES, ROWS, _COLUMNS], tl.float32)
    tiles = (read_tile(words_ptr, scale_ptr, places, scales),)
    for i in tl.static_range(1, AHEAD):
        tiles = tiles + (read_tile(words_ptr + i * (TILE // 4), scale_ptr + i * STEP, places, scales),)
    follow(DEPENDENT)
    for i in tl.range(0, LAST, num_stages=1):
        later = read_tile(words_ptr + (i + AHEAD) * (TILE // 4), scale_ptr + (i + AHEAD) * STEP, places, scales)
        total = add_product(total, tiles[0], digits_ptr + i * TILE + inputs, ROW, BITS, HOW, SLICES, ROWS, UNITS)
        tiles = tiles[1:] + (later,)
    for i in tl.static_range(AHEAD):
        place = digits_ptr + (LAST + i) * TILE + inputs
        total = add_product(total, tiles[i], place, ROW, BITS, HOW, SLICES, ROWS, UNITS)
    factors_ptr = (digits_ptr + TOKENS * DIGITS * (ROW * 8 // BITS)).to(tl.pointer_type(tl.float32))
    column = tl.arange(0, _COLUMNS)[None, None, :]
    weight = ((119 + BITS + 8 * (column % DIGITS)) << 23).to(tl.float32, bitcast=True)  # 2^(8 digit + bits - 8)
    for token in tl.static_range(TOKENS):
        own = tl.where(column // DIGITS == token, total * weight, 0.0)
        result = tl.sum(tl.sum(own, 2), 0) * tl.load(factors_ptr + token)
        place = out_ptr + token * rows.to(tl.int64) + first + tl.arange(0, ROWS)
        tl.store(place, result.to(out_ptr.dtype.element_ty))
