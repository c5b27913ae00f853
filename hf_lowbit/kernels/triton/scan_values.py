# mypy: disable-error-code="no-untyped-def"
"""What scan and convolution do to single values: read an operand, quantize it, steps and gates.

An operand is a :class:`hf_lowbit.kernels.operand.Laid`, which Triton takes as it is.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_ROUNDS_TO_INTEGERS = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 of this size has no fractions


@triton.jit
def scale_of(operand, channel, mask):
    """The float32 scales of channels; None without."""
    if operand.scale is None:
        scale = None
    else:
        scale = tl.load(operand.scale + channel // operand.run, mask=mask, other=1.0)
    return scale


@triton.jit
def to_codes(values, scale):
    """Codes -127..127 as floats, as :func:`hf_lowbit.kernels.quantize_codes` has them."""
    steps = values * tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
    steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    return (steps + _ROUNDS_TO_INTEGERS) - _ROUNDS_TO_INTEGERS


@triton.jit
def read(data, place, mask, scale):
    """float32 values: codes times their scale, floats rounded to its grid, or floats as they are without a scale."""
    values = tl.load(data + place, mask=mask, other=0).to(tl.float32)
    if scale is not None:
        if data.dtype.element_ty != tl.int8:
            values = to_codes(values, scale)
        values *= scale
    return values


@triton.jit
def time_steps(dt, lower, upper):
    """softplus(dt) within limits; NaN stays. Neither exponential nor logarithm leaves the range of floats."""
    small = tl.exp(-tl.abs(dt))
    more = 1.0 + small
    # log(1 + e) as its quotient by the rounded e, times e: exact where 1 + e is not
    log = tl.where(more == 1.0, small, tl.log(more) * (small / tl.where(more == 1.0, 1.0, more - 1.0)))
    step = tl.maximum(dt, 0.0) + log
    step = tl.where(step < lower, lower, step)
    return tl.where(step > upper, upper, step)


@triton.jit
def silu(x):
    """x times its logistic function."""
    small = tl.exp(-tl.abs(x))
    return x * (tl.where(x >= 0.0, 1.0, small) / (1.0 + small))


@triton.jit
def scales_of_states(scale, channel, state, mask):
    """What a code of the state ``[channels, states]`` is worth; ``scale``: a :class:`.scan_launch.StateScale`."""
    row = channel[:, None] * 0
    if scale.cluster is not None:
        row = tl.load(scale.cluster + channel[:, None], mask=mask, other=0)
    return tl.load(scale.data + row * scale.row_stride + state[None, :] * scale.stride, mask=mask, other=1.0)


@triton.jit
def read_state(data, place, scale, channel, state, mask):
    """float32 ``[channels, states]`` of floats or codes; zeros where there is none."""
    if data is None:
        values = mask.to(tl.float32) * 0.0
    else:
        values = tl.load(data + place, mask=mask, other=0).to(tl.float32)
        if data.dtype.element_ty == tl.int8:
            values *= scales_of_states(scale, channel, state, mask)
    return values


@triton.jit
def write_state(data, place, values, scale, channel, state, mask):
    """Floats, or codes where ``data`` is int8; nothing where there is none."""
    if data is not None:
        if data.dtype.element_ty == tl.int8:
            values = to_codes(values, scales_of_states(scale, channel, state, mask))
        tl.store(data + place, values.to(data.dtype.element_ty), mask=mask)
