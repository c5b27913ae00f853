# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel that quantizes tokens: what torch does in ten passes, in one."""

import triton
import triton.language as tl

_ROUNDS_TO_INTEGERS = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 of this size has no fractions


@triton.jit
def quantize(x_ptr, codes_ptr, scale_ptr, columns, stride, limit, BLOCK: tl.constexpr):
    """int8 codes of a token and its float32 scale, symmetric: to the nearest, ties to even."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * stride + column, mask=column < columns, other=0.0).to(tl.float32)
    undefined = tl.sum(x * 0.0, 0)  # NaN where a value is not finite
    scale = tl.math.div_rn(tl.max(tl.abs(x), 0), limit)
    steps = tl.math.div_rn(x, tl.zeros_like(x) + tl.where(scale == 0.0, 1.0, scale))
    steps = tl.where(steps == steps, steps, 0.0)
    steps = tl.minimum(tl.maximum(steps, -limit), limit)
    codes = (steps + _ROUNDS_TO_INTEGERS) - _ROUNDS_TO_INTEGERS
    tl.store(codes_ptr + token * columns + column, codes.to(tl.int8), mask=column < columns)
    tl.store(scale_ptr + token, scale + undefined)
