# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of the causal convolution: a tile of tokens and channels at a time."""

import triton
import triton.language as tl

from hf_lowbit.kernels.triton.scan_values import read, scale_of, silu, to_codes


@triton.jit
def convolve(
    x, weight, bias, state, out_scale, y, tokens, channels, out_run,
    TAPS: tl.constexpr, SLOTS: tl.constexpr, SILU: tl.constexpr, UPDATE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y ``[batch, tokens, channels]``; ``state`` ``[batch, channels, TAPS]`` as well with UPDATE.

    Program: (channels, tokens, batch). That of the first tokens alone reads the state, if tiles are no shorter than
    the past they reach into; so it may change it.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = channel < channels
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    batch = tl.program_id(2).to(tl.int64)
    kept = (batch * channels + channel) * TAPS
    scale = scale_of(x, channel, real)
    own_scale = None
    if state is not None and state.dtype.element_ty == tl.int8:
        own_scale = scale
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=real, other=0.0)[None, :]
    for tap in tl.static_range(TAPS):
        source = token + (tap - (TAPS - 1))
        known = ((source >= 0) & (source < tokens))[:, None] & real[None, :]
        place = batch * x.batch_stride + source.to(tl.int64)[:, None] * x.token_stride + channel[None, :]
        values = read(x.data, place, known, scale)
        if state is not None:
            past = (source < 0)[:, None] & real[None, :]
            values += read(state, kept[None, :] + (TAPS + source)[:, None], past, own_scale)
        total += tl.load(weight + channel * TAPS + tap, mask=real, other=0.0)[None, :] * values
    if SILU:
        total = silu(total)
    place = (batch * tokens + token.to(tl.int64)[:, None]) * channels + channel[None, :]
    written = (token < tokens)[:, None] & real[None, :]
    if out_scale is not None:
        total = to_codes(total, tl.load(out_scale + channel // out_run, mask=real, other=1.0))
    tl.store(y + place, total.to(y.dtype.element_ty), mask=written)
    if UPDATE and tl.program_id(1) == 0:
        keep_inputs(x, state, kept, batch, channel, real, tokens, scale, TAPS, SLOTS)


@triton.jit
def keep_inputs(x, state, kept, batch, channel, real, tokens, scale, TAPS: tl.constexpr, SLOTS: tl.constexpr):
    """The last inputs into the state: int8 codes as they are, or floats."""
    slot = tl.arange(0, SLOTS)[:, None]
    source = tokens - TAPS + slot
    inside = (slot < TAPS) & real[None, :]
    known = inside & (source >= 0)
    old = tl.load(state + kept[None, :] + (TAPS + source), mask=inside & (source < 0), other=0)
    place = batch * x.batch_stride + source.to(tl.int64) * x.token_stride + channel[None, :]
    if state.dtype.element_ty != tl.int8:
        new = read(x.data, place, known, scale)
    elif x.data.dtype.element_ty != tl.int8:
        new = to_codes(read(x.data, place, known, None), scale)
    else:
        new = tl.load(x.data + place, mask=known, other=0)
    newest = tl.where(source < 0, old, new.to(state.dtype.element_ty))
    tl.debug_barrier()  # all of the state is read before any of it is written
    tl.store(state + kept[None, :] + slot, newest, mask=inside)
