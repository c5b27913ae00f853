"""The table of each number format: 2^bits float32 values before scaling, indexed by code.

Every format of at most eight bits is such a table; what differs between INT4, E2M1, NF4 or a power exponent is only
how the values are made, and that is all this file contains. Tables are computed in float64 and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Dettmers et al., QLoRA (arXiv 2305.14314), appendix E: the NF4 values, as bitsandbytes stores them.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF_OFFSET = 0.9677083  # outermost quantile of the NormalFloat construction, as in bitsandbytes


def integer(bits: int) -> Tensor:
    """Two's complement integers -2^(b-1) .. 2^(b-1)-1 in ascending order; one bit is the binary pair -1, +1."""
    if bits == 1:
        return torch.tensor([-1.0, 1.0])
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float32)


def floating_point(exponent_bits: int, mantissa_bits: int, signed: bool = True) -> Tensor:
    """Sign, exponent, mantissa with IEEE bias and subnormals; every code is finite (no infinities, no NaN).

    Code layout is sign-exponent-mantissa from the high bit down, so E2M1 equals OCP's FP4; without ``signed`` there is
    no sign bit.
    """
    magnitudes = torch.arange(2 ** (exponent_bits + mantissa_bits), dtype=torch.float64)
    fraction = torch.remainder(magnitudes, 2**mantissa_bits) / 2**mantissa_bits
    exponent = torch.floor(magnitudes / 2**mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    normal = torch.exp2(exponent - bias) * (1 + fraction)
    subnormal = 2.0 ** (1 - bias) * fraction
    values = torch.where(exponent > 0, normal, subnormal)
    return (torch.cat([values, -values]) if signed else values).float()


def torch_float8(dtype: torch.dtype) -> Tensor:
    """The 256 values of a torch float8 type, NaN and infinite codes included, by reinterpreting each byte."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def normal_float(bits: int) -> Tensor:
    """NormalFloat: quantiles of a standard normal, with an exact zero, scaled to [-1, 1] (QLoRA, arXiv 2305.14314).

    One more value lies on the positive side than on the negative one, as in bitsandbytes.
    """
    if bits == 4:
        return torch.tensor(_NF4)
    from scipy.stats import norm

    half = 2 ** (bits - 1)
    positive = norm.ppf(torch.linspace(_NF_OFFSET, 0.5, half + 1, dtype=torch.float64)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(_NF_OFFSET, 0.5, half, dtype=torch.float64)[:-1].numpy())
    values = torch.tensor([*negative, 0.0, *positive], dtype=torch.float64).sort().values
    return (values / values.max()).float()


def lloyd_max(bits: int) -> Tensor:
    """The values of least squared error for a normal variable (Lloyd 1982; Max 1960), ascending, scaled to [-1, 1].

    No value is zero. Each is the mean of what is rounded to it; found by Lloyd's iteration.
    """
    values = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    ends = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(2000):  # 4 bits are exact to float32 by then
        edges = torch.cat([-ends, (values[1:] + values[:-1]) / 2, ends])
        density, below = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(edges)
        values = -density.diff() / below.diff()
        values = (values - values.flip(0)) / 2
    return (values / values[-1]).float()


def ternary() -> Tensor:
    """-1, 0, +1 for codes 0, 1, 2; code 3 is never written and reads as zero."""
    return torch.tensor([-1.0, 0.0, 1.0, 0.0])


def power(bits: int, exponent: float) -> Tensor:
    """Power quantizer with row-max normalisation: sign(k) (|k| / qmax)^(1/a), qmax = 2^(b-1)-1.

    PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600) with 0 < a <= 1.2; the row-max form is our equivalent
    rewriting of their per-channel scale. The code -2^(b-1) lies outside their range and repeats the value -1.
    """
    qmax = 2 ** (bits - 1) - 1
    k = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64).clamp(min=-qmax)
    return (k.sign() * (k.abs() / qmax).pow(1 / exponent)).float()
