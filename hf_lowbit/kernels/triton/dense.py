# mypy: disable-error-code="no-untyped-def"
"""The Gluon kernel for many tokens on Hopper: some warps decode weights, others do nothing but multiply.

Warps that produce read packed codes, decode them, times their scales and rounded, exactly as the reference's rows are,
and store them in shared memory, where the tensor cores read both sides of a product; inputs come there by the copy
engine. So decoding takes no time from the tensor cores, and no register that they need. Stages of 64 columns go round
in a ring: ``full`` says that a stage can be multiplied, ``empty`` that it has been.

Blocks stay for the whole launch. Each takes as many whole tiles of the output; those that are left then, and would
leave most multiprocessors idle, are cut into parts of their columns, whose float32 sums :mod:`.dense_sums` adds.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_lowbit.kernels.triton.dense_codes import STEP, WORDS, copy_out, place_of, produce

SIDE = gl.constexpr(64)  # of the output, of one warp group's instruction
PIECE = gl.constexpr(32)  # of the output's other side, on its way out
_NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # without underscore: in later versions


@gluon.jit
def halves(x):
    """Of the columns."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, [rows, 2, columns // 2]), (0, 2, 1)))


@gluon.jit
def pieces_of(x):
    """PIECE columns each, of 128 or 256: registers alone."""
    left, right = halves(x)
    if x.shape[1] == 8 * PIECE:
        a, b = halves(left)
        c, d = halves(right)
        pieces = halves(a) + halves(b) + halves(c) + halves(d)
    else:
        pieces = halves(left) + halves(right)
    return pieces


@gluon.jit
def multiply(
    given,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, FLIP: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """SIDE of a tile's rows times all its tokens (FLIP), or SIDE tokens times all its rows; out by the copy engine."""
    out_desc, sums_desc, xs, ws, ys, full, empty, work = given
    units, whole = work[0], work[1]
    N: gl.constexpr = TOKENS if FLIP else ROWS
    M: gl.constexpr = ROWS if FLIP else TOKENS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    TYPE: gl.constexpr = out_desc.dtype
    SPLIT: gl.constexpr = sums_desc is not None
    y = ys.index(WHICH)
    if _NAMED:
        z = y.reinterpret(TYPE, out_desc.block_type.shape, out_desc.layout)
    else:
        z = y._reinterpret(TYPE, out_desc.block_type.shape, out_desc.layout)
    stage, phase, last = 0, 0, STAGES - 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        token, row_tile, begin, end, after = place_of(unit, work)
        total = gl.zeros([SIDE, N], gl.float32, MMA)
        for k in range(2 * begin, 2 * end):
            if FLIP:
                left = ws.index(stage).slice(WHICH * SIDE, SIDE, dim=0)
                right = xs.index(stage).permute((1, 0))
            else:
                left = xs.index(stage).slice(WHICH * SIDE, SIDE, dim=0)
                right = ws.index(stage).permute((1, 0))
            mbarrier.wait(full.index(stage), phase)
            total = warpgroup_mma(left, right, total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])  # all but this one's: the stage before is free
            mbarrier.arrive(empty.index(last), count=1, pred=k > 2 * begin)
            last = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(last), count=1)
        pieces = pieces_of(total)
        for i in gl.static_range(N // PIECE):
            tma.store_wait(0)
            if SPLIT:
                if unit >= whole:
                    y.store(pieces[i])
                    fence_async_shared()
                    copy_out(sums_desc, [after * M + WHICH * SIDE, i * PIECE], y)
                else:
                    put(out_desc, z, pieces[i], token * TOKENS, row_tile * ROWS, i * PIECE, WHICH * SIDE, FLIP)
            else:
                put(out_desc, z, pieces[i], token * TOKENS, row_tile * ROWS, i * PIECE, WHICH * SIDE, FLIP)
    tma.store_wait(0)


@gluon.jit
def put(out_desc, z, piece, token, row, across, down, FLIP: gl.constexpr):
    """A piece ``[SIDE, PIECE]`` of a tile, from ``[down, across]`` on, to where it belongs."""
    if FLIP:
        z.permute((1, 0)).store(piece.to(z.dtype))
        fence_async_shared()
        copy_out(out_desc, [token + across, row + down], z)
    else:
        z.store(piece.to(z.dtype))
        fence_async_shared()
        copy_out(out_desc, [token + down, row + across], z)


@gluon.jit(do_not_specialize=("tokens", "rows", "columns", "groups", "units", "whole", "rest", "parts"))
def dense(
    x_desc, words_desc, scale_ptr, out_desc, sums_desc, tokens, rows, columns, groups, units, whole, rest, parts,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, GROUP_STEPS: gl.constexpr, PRODUCERS: gl.constexpr, CONSUMERS: gl.constexpr,
    FLIP: gl.constexpr, MULTIPLYING: gl.constexpr, PRODUCING: gl.constexpr,
):  # fmt: skip
    """Inputs ``[tokens, columns]`` of 16 bits times packed codes ``[rows, words]``: ``[tokens, rows]``.

    Descriptors: inputs ``[TOKENS, 64]``, codes ``[ROWS, 16]``, outputs ``[32, 64]`` (FLIP) or ``[64, 32]``, sums of
    parts ``[64, 32]``, None where all tiles are whole. Scales ``[rows, groups]`` are of the inputs' type. PRODUCERS
    and CONSUMERS are warp groups; MULTIPLYING and PRODUCING the registers of a thread of theirs.
    """
    TYPE: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(TYPE, [STAGES, TOKENS, STEP], x_desc.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, STEP // 2], gl.NVMMASharedLayout(128, 32, 2))
    if _NAMED:
        weights = ws.reinterpret(TYPE, [STAGES, ROWS, STEP], gl.NVMMASharedLayout(128, 16, 2))
    else:
        weights = ws._reinterpret(TYPE, [STAGES, ROWS, STEP], gl.NVMMASharedLayout(128, 16, 2))
    cs = gl.allocate_shared_memory(gl.int32, [AHEAD * PRODUCERS, ROWS, WORDS], words_desc.layout)
    ys = gl.allocate_shared_memory(gl.float32, [CONSUMERS, SIDE, PIECE], gl.NVMMASharedLayout(128, 32, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [AHEAD * PRODUCERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    for i in gl.static_range(AHEAD * PRODUCERS):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    pairs, token_tiles = columns // (2 * STEP), gl.cdiv(tokens, TOKENS)
    scale_ptr = scale_ptr.to(gl.pointer_type(TYPE), bitcast=True)
    work = (units, whole, rest, parts, pairs, token_tiles)
    makes = (x_desc, words_desc, scale_ptr, xs, ws, cs, full, empty, ready, work, rows, groups)
    takes = (out_desc, sums_desc, xs, weights, ys, full, empty, work)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (multiply, (takes, ROWS, TOKENS, STAGES, FLIP, 0)),
                (produce, (makes, ROWS, TOKENS, STAGES, AHEAD, GROUP_STEPS, PRODUCERS, 0)),
                (produce, (makes, ROWS, TOKENS, STAGES, AHEAD, GROUP_STEPS, PRODUCERS, 1)),
            ],
            [4, 4],
            [PRODUCING, PRODUCING],
        )
    elif PRODUCERS == 1:
        gl.warp_specialize(
            [
                (multiply, (takes, ROWS, TOKENS, STAGES, FLIP, 0)),
                (multiply, (takes, ROWS, TOKENS, STAGES, FLIP, 1)),
                (produce, (makes, ROWS, TOKENS, STAGES, AHEAD, GROUP_STEPS, PRODUCERS, 0)),
            ],
            [4, 4],
            [MULTIPLYING, PRODUCING],
        )
    else:
        gl.warp_specialize(
            [
                (multiply, (takes, ROWS, TOKENS, STAGES, FLIP, 0)),
                (multiply, (takes, ROWS, TOKENS, STAGES, FLIP, 1)),
                (produce, (makes, ROWS, TOKENS, STAGES, AHEAD, GROUP_STEPS, PRODUCERS, 0)),
                (produce, (makes, ROWS, TOKENS, STAGES, AHEAD, GROUP_STEPS, PRODUCERS, 1)),
            ],
            [4, 4, 4],
            [MULTIPLYING, PRODUCING, PRODUCING],
        )
