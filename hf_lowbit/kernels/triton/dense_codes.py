# mypy: disable-error-code="no-untyped-def"
"""The warps of :mod:`.dense` that decode weights into shared memory, and have inputs copied there."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

STEP = gl.constexpr(64)  # columns of a stage; codes are brought for two at a time
# Later versions of Triton name them so.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

WORDS = gl.constexpr(16)  # of a pair of stages
_HALF = gl.constexpr(8)


@gluon.constexpr_function
def in_order(is_bfloat16):
    """PTX: codes of 4 bits of the word ``$4`` to pairs of floats in their order, less 8 and times the pair ``$5``.

    A code is put into the mantissa of 128, or 1024; what that adds is taken away exactly, and scales round once.
    """
    kind, *halves = ("bf16x2", 0x4300, 0xC308, 0x3F80) if is_bfloat16 else ("f16x2", 0x6400, 0xE408, 0x3C00)
    unit, base, one = [hex(half << 16 | half) for half in halves]
    lines = [f"shr.u32 u, $4, 4; mov.b32 a, {one}; mov.b32 b, {base}; mov.b32 c, 0x80008000;"]
    lines += [f"prmt.b32 ${i}, $4, u, 0x0{4 + i}0{i}; lop3.b32 ${i}, ${i}, 0x000f000f, {unit}, 0xEA;" for i in range(4)]
    lines += [f"fma.rn.{kind} ${i}, ${i}, a, b;" for i in range(4)]
    lines += [f"fma.rn.{kind} ${i}, ${i}, $5, c;" for i in range(4)]
    return "{ .reg .b32 u, a, b, c; " + " ".join(lines) + " }"


@gluon.jit
def place_of(unit, work):
    """A unit's tile of tokens and of rows, its first pair of stages, the last, and its place among parts' sums.

    Units are ``whole`` tiles, then the first parts of ``rest`` more, then their second ones, and so on.
    """
    _, whole, rest, parts, pairs, token_tiles = work
    after = gl.maximum(unit - whole, 0)
    part = after // rest
    is_whole = unit < whole
    tile = gl.where(is_whole, unit, whole + after - part * rest)
    begin = gl.where(is_whole, 0, part * pairs // parts)
    end = gl.where(is_whole, pairs, (part + 1) * pairs // parts)
    return tile % token_tiles, tile // token_tiles, begin, end, after


@gluon.jit
def read_scales(scales_ptr, pair, GROUP_STEPS: gl.constexpr):
    """Of the rows, for both stages of a pair; GROUP_STEPS: stages of a group, 0 where a row is one."""
    if GROUP_STEPS == 0:
        one = gl.load(scales_ptr)
        other = one
    elif GROUP_STEPS == 1:
        one = gl.load(scales_ptr + 2 * pair)
        other = gl.load(scales_ptr + 2 * pair + 1)
    else:
        one = gl.load(scales_ptr + pair // (GROUP_STEPS // 2))
        other = one
    return one, other


@gluon.jit
def decode(words, scale, ws, BFLOAT16: gl.constexpr, ROWS: gl.constexpr):
    """Words ``[ROWS, 8]`` to floats in shared memory, two in each of its words ``[ROWS, 32]``."""
    pair = (scale.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) * 0x10001
    pairs, _ = gl.broadcast(pair[:, None], words)
    a, b, c, d = gl.inline_asm_elementwise(
        in_order(BFLOAT16), "=r,=r,=r,=r,r,r", (words, pairs), dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )
    ws.store(gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [ROWS, STEP // 2]))
    fence_async_shared()


@gluon.jit
def produce(
    given,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, GROUP_STEPS: gl.constexpr, PRODUCERS: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Fill pairs of stages: of PRODUCERS each takes every so many-th. Codes are on their way AHEAD pairs before."""
    x_desc, words_desc, scale_ptr, xs, ws, cs, full, empty, ready, work, rows, groups = given
    units = work[0]
    up: gl.constexpr = [[64, 0]]
    # Eight threads hold two 16-byte pieces of four rows each: they load and store without conflicts of banks.
    lanes: gl.constexpr = [[0, 4], [1, 0], [2, 0], [4, 0], [8, 0]]
    BOTH: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 8]] + up, lanes, [[16, 0], [32, 0]], [], [ROWS, WORDS]
    )
    ONE: gl.constexpr = gl.DistributedLinearLayout([[0, 1], [0, 2]] + up, lanes, [[16, 0], [32, 0]], [], [ROWS, _HALF])
    SLOTS: gl.constexpr = STAGES // 2
    BFLOAT16: gl.constexpr = xs.dtype == gl.bfloat16
    # What the kernel ahead wrote can be read from here on, and the next one may come.
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    unit, blocks = gl.program_id(0), gl.num_programs(0)
    token, row_tile, begin, end, _ = place_of(unit, work)
    pair = begin + WHICH
    next_unit, next_pair, next_end, next_row = unit, pair, end, row_tile * ROWS
    for i in gl.static_range(AHEAD):
        there, place = next_unit < units, WHICH * AHEAD + i
        mbarrier.expect(ready.index(place), ROWS * WORDS * 4, pred=there)
        copy_in(words_desc, [next_row, next_pair * WORDS], ready.index(place), cs.index(place), pred=there)
        next_pair += PRODUCERS
        if next_pair >= next_end:
            next_unit += blocks
            _, t, b, e, _ = place_of(next_unit, work)
            next_pair, next_end, next_row = next_pair - next_end + b, e, t * ROWS
    inner = gl.arange(0, ROWS, gl.SliceLayout(1, ONE))
    scales_ptr = scale_ptr + gl.minimum(row_tile * ROWS + inner, rows - 1) * groups
    first_token = token * TOKENS
    one, other = read_scales(scales_ptr, pair, GROUP_STEPS)
    slot, phase, place, place_phase = WHICH, 1, 0, 0
    while unit < units:
        own = WHICH * AHEAD + place
        mbarrier.wait(ready.index(own), place_phase)
        words = gl.permute(gl.reshape(cs.index(own).load(BOTH), [ROWS, 2, _HALF]), (0, 2, 1))
        left, right = gl.split(words)
        stage = 2 * slot
        mbarrier.wait(empty.index(stage), phase)
        copy_in(x_desc, [first_token, pair * (2 * STEP)], full.index(stage), xs.index(stage))
        decode(gl.convert_layout(left, ONE), one, ws.index(stage), BFLOAT16, ROWS)
        mbarrier.expect(full.index(stage), TOKENS * STEP * 2)
        there = next_unit < units
        mbarrier.expect(ready.index(own), ROWS * WORDS * 4, pred=there)
        copy_in(words_desc, [next_row, next_pair * WORDS], ready.index(own), cs.index(own), pred=there)
        stage += 1
        mbarrier.wait(empty.index(stage), phase)
        copy_in(x_desc, [first_token, pair * (2 * STEP) + STEP], full.index(stage), xs.index(stage))
        decode(gl.convert_layout(right, ONE), other, ws.index(stage), BFLOAT16, ROWS)
        mbarrier.expect(full.index(stage), TOKENS * STEP * 2)
        place += 1
        if place == AHEAD:
            place = 0
            place_phase ^= 1
        slot += PRODUCERS
        if slot >= SLOTS:
            slot -= SLOTS
            phase ^= 1
        pair += PRODUCERS
        if pair >= end:
            unit += blocks
            token, row_tile, begin, e, _ = place_of(unit, work)
            pair, end = pair - end + begin, e
            scales_ptr = scale_ptr + gl.minimum(row_tile * ROWS + inner, rows - 1) * groups
            first_token = token * TOKENS
        one, other = read_scales(scales_ptr, gl.where(unit < units, pair, 0), GROUP_STEPS)
        next_pair += PRODUCERS
        if next_pair >= next_end:
            next_unit += blocks
            _, t, b, e, _ = place_of(next_unit, work)
            next_pair, next_end, next_row = next_pair - next_end + b, e, t * ROWS
