"""Small floating-point formats whose codes are all finite: their names, and rounding by arithmetic.

fp_eXmY has a sign, X exponent and Y mantissa bits, unsigned ufp_eXmY has no sign. The exponent bias is IEEE's; a scale
beside the codes makes it any real number (Kuzmin et al., arXiv 2208.09225: clipping value and bias are one parameter).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_NAME = re.compile(r"(u?)fp_e(\d)m(\d)")
_EXPONENT_FIELD = 0x7F800000  # of a float32: alone it is the power of two below the value
_MANTISSA_BITS = 23

# Of a search of the split, by width: those of the papers at 4 and 8 bits, where E1M2 is the symmetric INT4 grid.
# Chen et al. do not say which of them they scan [U]; 5, 6 and 7 bits are ours.
SPLITS = {
    4: ("fp_e1m2", "fp_e2m1", "fp_e3m0"),
    5: ("fp_e2m2", "fp_e3m1"),
    6: ("fp_e2m3", "fp_e3m2"),
    7: ("fp_e2m4", "fp_e3m3", "fp_e4m2"),
    8: ("fp_e2m5", "fp_e3m4", "fp_e4m3", "fp_e5m2"),
}
# Where nothing is searched: what serves tokens best whose largest value decides the scale [ours]. At 8 bits on the
# small trained denoisers of the tests E2M5 kept 36.7 dB of the output of both, E3M4 33.3 and 34.3.
USUAL_SPLIT = {4: "fp_e2m1", 5: "fp_e2m2", 6: "fp_e2m3", 7: "fp_e2m4", 8: "fp_e2m5"}


@dataclass(frozen=True)
class FloatingPoint:
    """One format.

    Attributes:
        exponent_bits: 1 to 5.
        mantissa_bits: 0 to 7.
        signed: whether there are negative values.
    """

    exponent_bits: int
    mantissa_bits: int
    signed: bool = True

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def limit(self) -> float:
        """The largest value: all exponent and mantissa bits set."""
        bias = 2 ** (self.exponent_bits - 1) - 1
        return float((2 - 2.0**-self.mantissa_bits) * 2.0 ** (2**self.exponent_bits - 1 - bias))

    def round(self, x: Tensor) -> Tensor:
        """Nearest values, float32 like ``x``; what lies beyond the range saturates, NaN stays NaN.

        Ties go to the even multiple of the step, which is the even code wherever there is a mantissa. The step follows
        from the binade of |x|: adding a number whose last bit is worth that step rounds to it.
        """
        x = x.float()
        x = x.clamp(-self.limit if self.signed else 0.0, self.limit)
        binade = (x.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)  # 0 for zero and subnormals of float32
        smallest = 2.0 ** (2 - 2 ** (self.exponent_bits - 1))  # of normal values; below, steps are as there
        rounder = binade.clamp_(min=smallest).mul_(1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits))
        return (x + rounder).sub_(rounder)


def floating_point(name: str) -> FloatingPoint | None:
    """The format called ``fp_eXmY`` or ``ufp_eXmY``; None for other names."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return FloatingPoint(int(match[2]), int(match[3]), not match[1])


def unsigned_splits(bits: int) -> tuple[str, ...]:
    """Unsigned formats of a width: of every signed split, its sign bit given to the mantissa or to the exponent."""
    signed = [split for name in SPLITS[bits] if (split := floating_point(name)) is not None]
    longer = [(split.exponent_bits, split.mantissa_bits + 1) for split in signed]
    wider = [(split.exponent_bits + 1, split.mantissa_bits) for split in signed if split.exponent_bits < 5]
    return tuple(f"ufp_e{e}m{m}" for e, m in dict.fromkeys([*longer, *wider]))
