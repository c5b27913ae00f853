# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of the selective scan, token by token: a program holds the states of some channels of a group.

A prompt is cut into segments that run side by side: each scans from zero for what it adds to the state, these are
chained, and each scans again from the state before it. Twice the work, but many times as many programs. A single token
or a short prompt is one segment and one launch.
"""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton.scan_values import LOG2_E, read, read_state, scale_of, silu, time_steps, write_state


@triton.jit
def read_decay(A, head, real, state, n, OWN: tl.constexpr):
    """A of channels, ``[channels, STATES]`` or ``[channels, 1]``, times log2 e: exponentials are of two."""
    if OWN:
        decay = tl.load(A + head[:, None] * n + state[None, :], mask=real[:, None] & (state < n)[None, :], other=0.0)
    else:
        decay = tl.load(A + head, mask=real, other=0.0)[:, None]
    return decay * LOG2_E


@triton.jit
def scan_tokens(
    x, dt, A, B, C, D, z, dt_bias, lower, upper,
    before, after, state_scale, sums, y, y_stride, peaks,
    tokens, length, blocks, per_group, width, n, peaks_every,
    OWN: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """One segment of ``length`` tokens of some channels.

    Program: (group and block of its ``per_group`` channels, segment, batch). Outputs that are None are not computed:
    ``after`` and ``before`` states ``[batch, segments, channels, n]``, ``sums`` of the steps ``[batch, segments,
    heads]``, ``y``, ``peaks``. RUN tokens are read before their outputs are written.
    """
    group = tl.program_id(0) // blocks
    inner = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    real = inner < per_group
    channel = group * per_group + inner
    head = channel // width
    batch = tl.program_id(2).to(tl.int64)
    channels, segments = per_group * (tl.num_programs(0) // blocks), tl.num_programs(1)
    first = tl.program_id(1) * length
    last = tl.minimum(first + length, tokens)
    state = tl.arange(0, STATES)
    kept = state < n
    mask = real[:, None] & kept[None, :]
    place = ((batch * segments + tl.program_id(1)) * channels + channel[:, None]) * n + state[None, :]
    of_group = group * n + state
    x_scale = scale_of(x, channel, real)
    dt_scale = scale_of(dt, head, real)
    B_scale = scale_of(B, of_group, kept)
    C_scale = scale_of(C, of_group, kept)
    decay = read_decay(A, head, real, state, n, OWN)
    bias = tl.zeros([CHANNELS], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + head, mask=real, other=0.0)
    h = read_state(before, place, state_scale, channel, state, mask)
    total = tl.zeros([CHANNELS], tl.float32)
    peak = tl.zeros([CHANNELS, STATES], tl.float32)
    row = tl.arange(0, RUN)
    for start in range(first, last, RUN):
        outputs = tl.zeros([RUN, CHANNELS], tl.float32)
        for i in tl.static_range(RUN):
            t = tl.cast(start + i, tl.int64)
            live = t < last
            known, own = real & live, kept & live
            step = read(dt.data, batch * dt.batch_stride + t * dt.token_stride + head, known, dt_scale)
            step = tl.where(known, time_steps(step + bias, lower, upper), 0.0)
            token = read(x.data, batch * x.batch_stride + t * x.token_stride + channel, known, x_scale)
            b = read(B.data, batch * B.batch_stride + t * B.token_stride + of_group, own, B_scale)
            h = tl.exp2(step[:, None] * decay) * h + (step * token)[:, None] * b[None, :]
            if y is not None:
                c = read(C.data, batch * C.batch_stride + t * C.token_stride + of_group, own, C_scale)
                outputs = tl.where((row == i)[:, None], tl.sum(h * c[None, :], 1)[None, :], outputs)
            if sums is not None:
                total += step
            if peaks is not None:
                peak = tl.maximum(peak, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
                if live & (((t + 1) % peaks_every == 0) | (t == last - 1)):
                    window = batch * tl.cdiv(tokens, peaks_every) + t // peaks_every
                    at = (window * channels + channel[:, None]) * n + state[None, :]
                    tl.store(peaks + at, peak, mask=mask)
                    peak = tl.zeros([CHANNELS, STATES], tl.float32)
        if y is not None:
            live = start + row < last
            own = batch * y_stride + tl.cast(start + row, tl.int64)[:, None] * channels + channel[None, :]
            write_outputs(outputs, x, D, z, y + own, batch, start + row, live, channel, real, head, x_scale)
    write_state(after, place, h, state_scale, channel, state, mask)
    if sums is not None:
        heads = channels // width
        own = real & (channel % width == 0)
        tl.store(sums + (batch * segments + tl.program_id(1)) * heads + head, total, mask=own)


@triton.jit
def write_outputs(outputs, x, D, z, places, batch, token, live, channel, real, head, x_scale):
    """``[tokens, channels]`` to their places: with D x, through the gate."""
    t = token.to(tl.int64)[:, None]
    known = live[:, None] & real[None, :]
    if D is not None:
        own = read(x.data, batch * x.batch_stride + t * x.token_stride + channel[None, :], known, x_scale)
        outputs += tl.load(D + head, mask=real, other=0.0)[None, :] * own
    if z.data is not None:
        place = batch * z.batch_stride + t * z.token_stride + channel[None, :]
        outputs *= silu(read(z.data, place, known, scale_of(z, channel, real)))
    tl.store(places, outputs.to(places.dtype.element_ty), mask=known)


@triton.jit
def chain_states(
    A, before, after, state_scale, states, sums, segments, channels, width, n,
    OWN: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """``states`` ``[batch, segments, channels, n]`` from what each segment adds to what each begins with, in place."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    head = channel // width
    batch = tl.program_id(1).to(tl.int64)
    state = tl.arange(0, STATES)
    mask = real[:, None] & (state < n)[None, :]
    decay = read_decay(A, head, real, state, n, OWN)
    place = (batch * channels + channel[:, None]) * n + state[None, :]
    h = read_state(before, place, state_scale, channel, state, mask)
    stride, heads = tl.cast(channels, tl.int64) * n, channels // width
    own = states + batch * segments * stride + channel[:, None] * n + state[None, :]
    totals = sums + batch * segments * heads + head
    added = tl.load(own, mask=mask, other=0.0)
    total = tl.load(totals, mask=real, other=0.0)
    for segment in range(segments):
        left = segment + 1 < segments  # what comes next is on its way while this is written
        added_next = tl.load(own + stride, mask=mask & left, other=0.0)
        total_next = tl.load(totals + heads, mask=real & left, other=0.0)
        tl.store(own, h, mask=mask)
        h = tl.exp2(total[:, None] * decay) * h + added
        added, total = added_next, total_next
        own += stride
        totals += heads
    write_state(after, place, h, state_scale, channel, state, mask)
