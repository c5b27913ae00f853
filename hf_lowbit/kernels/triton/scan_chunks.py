# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of Mamba-2's scan by matrix products, a chunk of tokens at a time.

With one decay per head, what a chunk adds to the state and what it puts out are small masked products (Dao & Gu 2024,
arXiv:2405.21060, section 6); :func:`hf_lowbit.kernels.triton.scan.chain_states` carries the states from one chunk to
the next. A value that is not finite reaches all outputs of its chunk.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton.scan import write_outputs
from hf_lowbit.kernels.triton.scan_values import LOG2_E, read, scale_of, time_steps


@triton.jit
def chunk_steps(dt, dt_bias, A, batch, head, token, live, lower, upper):
    """The steps of a chunk, zero past its end, and the logarithm (of two) of the decay up to each token."""
    place = batch * dt.batch_stride + token.to(tl.int64) * dt.token_stride + head
    step = read(dt.data, place, live, scale_of(dt, head + token * 0, live))
    if dt_bias is not None:
        step += tl.load(dt_bias + head)
    step = tl.where(live, time_steps(step, lower, upper), 0.0)
    return step, tl.cumsum(step * (tl.load(A + head) * LOG2_E), 0)


@triton.jit
def read_tile(operand, batch, token, live, channel, real):
    """float32 ``[tokens, channels]``."""
    place = batch * operand.batch_stride + token.to(tl.int64)[:, None] * operand.token_stride + channel[None, :]
    scale = scale_of(operand, channel, real)
    if scale is not None:
        scale = scale[None, :]
    return read(operand.data, place, live[:, None] & real[None, :], scale)


@triton.jit
def chunk_states(
    x, dt, A, B, dt_bias, lower, upper, states, sums, tokens, heads, per_group, width, n,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the states of a head, ``[batch, chunks, heads * width, n]``, and the sum of its steps.

    Program: (head, chunk, batch).
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    inner, state = tl.arange(0, WIDTH), tl.arange(0, STATES)
    step, log = chunk_steps(dt, dt_bias, A, batch, head, token, live, lower, upper)
    to_end = tl.exp2(tl.sum(step * (tl.load(A + head) * LOG2_E), 0) - log)
    values = read_tile(x, batch, token, live, head * width + inner, inner < width) * (step * to_end)[:, None]
    b = read_tile(B, batch, token, live, head // per_group * n + state, state < n)
    added = tl.dot(tl.trans(values), b, input_precision=PRECISION)
    at = batch * tl.num_programs(1) + tl.program_id(1)
    place = ((at * heads + head) * width + inner[:, None]) * n + state[None, :]
    tl.store(states + place, added, mask=(inner < width)[:, None] & (state < n)[None, :])
    tl.store(sums + at * heads + head, tl.sum(step, 0))


@triton.jit
def chunk_outputs(
    x, dt, A, B, C, D, z, dt_bias, lower, upper, states, y, y_stride, tokens, heads, per_group, width, n,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of a chunk and head, from the tokens of the chunk and from the state before it.

    Program: (head, chunk, batch).
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    inner, state = tl.arange(0, WIDTH), tl.arange(0, STATES)
    real, kept = inner < width, state < n
    channel, of_group = head * width + inner, head // per_group * n + state
    step, log = chunk_steps(dt, dt_bias, A, batch, head, token, live, lower, upper)
    c = read_tile(C, batch, token, live, of_group, kept)
    at = batch * tl.num_programs(1) + tl.program_id(1)
    place = ((at * heads + head) * width + inner[:, None]) * n + state[None, :]
    before = tl.load(states + place, mask=real[:, None] & kept[None, :], other=0.0)
    outputs = tl.dot(c, tl.trans(before), input_precision=PRECISION) * tl.exp2(log)[:, None]
    b = read_tile(B, batch, token, live, of_group, kept)
    scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    earlier = token[:, None] >= token[None, :]
    weights = scores * tl.exp2(tl.where(earlier, log[:, None] - log[None, :], float("-inf")))
    values = read_tile(x, batch, token, live, channel, real) * step[:, None]
    outputs += tl.dot(weights, values, input_precision=PRECISION)
    x_scale = scale_of(x, channel, real)
    own = batch * y_stride + token.to(tl.int64)[:, None] * (heads * width) + channel[None, :]
    write_outputs(outputs, x, D, z, y + own, batch, token, live, channel, real, channel * 0 + head, x_scale)
