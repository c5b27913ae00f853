"""NumberFormat: what the codes of a weight or activation mean, and the lookup of formats by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowbit.formats import tables
from hf_lowbit.formats.floating_point import SPLITS, floating_point
from hf_lowbit.suggestion import unknown

_TORCH_FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_INTEGER_MULTIPLIERS = (1, 2, 4, 8, 16)  # E2M1 times 2 is an integer, and so on


@dataclass(frozen=True, eq=False)
class NumberFormat:
    """A named table of 2^bits values.

    Attributes:
        name: canonical name, as written on disk.
        bits: width of a code.
        table: float32 ``[2^bits]``; value of each code before scaling. Codes of infinities and NaN exist in the
            torch float8 variants only and are never produced by :meth:`encode`.
    """

    name: str
    bits: int
    table: Tensor
    _order: Tensor = field(init=False, repr=False)
    _boundaries: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        codes = torch.arange(len(self.table))[torch.isfinite(self.table)]
        values, first = torch.unique(self.table[codes] + 0.0, return_inverse=True)  # + 0.0 turns -0 into +0
        lowest = torch.full((len(values),), len(self.table)).scatter_reduce(0, first, codes, "amin")
        middle = (values[1:] + values[:-1]) / 2
        # A value on a boundary falls below it; where the code below is odd, the boundary moves down by one float.
        down = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
        object.__setattr__(self, "_order", lowest.to(torch.uint8))
        object.__setattr__(self, "_boundaries", torch.where(lowest[:-1] % 2 == 0, middle, down))

    @property
    def max_value(self) -> float:
        """Largest finite magnitude of the table: what the largest weight of a group is scaled to."""
        return self.table[torch.isfinite(self.table)].abs().max().item()

    @property
    def is_integer_grid(self) -> bool:
        """True for the two's complement integers of 2 to 8 bits, for which an integer zero point is exact."""
        return self.name == "int" and self.bits > 1

    @property
    def integer_multiplier(self) -> int | None:
        """Smallest m for which the table is int8 integers over m, as float32 rounds them; None if there is none.

        Then int8 dot products are exact sums: of E2M1 m is 2; of powers with the exponent 1/2, whose values are the
        squares k |k| / qmax^2, it is qmax^2 where that is at most 127 (up to 4 bits); with the exponent 1 it is qmax.
        """
        qmax = 2 ** (self.bits - 1) - 1
        for multiplier in (qmax, qmax**2) if self.name == "power" else _INTEGER_MULTIPLIERS:
            scaled = (self.table * multiplier).round()
            if torch.equal(scaled / multiplier, self.table) and scaled.abs().max() <= 128 and scaled.max() <= 127:
                return multiplier
        return None

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        """The finite values in ascending order, and the boundaries between them: what is not above one rounds down."""
        return self.table[self._order.long()], self._boundaries

    def encode(self, x: Tensor) -> Tensor:
        """Nearest code of each value; ties go to the even code (as IEEE rounding and torch casts do).

        Args:
            x: float tensor of any shape, already divided by its scale. Values beyond the table saturate.

        Returns:
            uint8 codes of the same shape.
        """
        x = x.float()
        if self.is_integer_grid:
            low = self.table[0].item()
            return (x.round().clamp_(low, self.table[-1].item()) - low).to(torch.uint8)
        position = torch.bucketize(x.contiguous(), self._boundaries.to(x.device), out_int32=True)
        return look_up(self._order.to(x.device), position)

    def nearest(self, x: Tensor) -> Tensor:
        """The value of each nearest code, float32: ``decode(encode(x))`` without the detour over codes."""
        if self.is_integer_grid:
            return x.round().clamp_(self.table[0].item(), self.table[-1].item())
        position = torch.bucketize(x.float().contiguous(), self._boundaries.to(x.device), out_int32=True)
        return look_up(self.levels[0].to(x.device), position)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of integer codes, unscaled."""
        return look_up(self.table.to(codes.device), codes)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """``table[codes]`` for integer codes of any shape; index_select is several times faster than indexing on a CPU."""
    return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def format_names() -> dict[str, str]:
    """Every accepted ``format`` name with the widths it allows, for help texts and error messages."""
    return {
        "int": "1..8 bits",
        "fp_eXmY": "2..8 bits, 1 + X + Y, every code finite (for example fp_e2m1, fp_e4m3)",
        "fp": "4..8 bits, X and Y found by a method that searches them (fp_diffusion)",
        "float8_e4m3fn": "8 bits, the OCP/torch variant (alias fp_e4m3fn)",
        "float8_e5m2": "8 bits, the OCP/torch variant",
        "nf": "2..4 bits",
        "lloyd": "2..4 bits, the values of least squared error for normal weights (Lloyd-Max)",
        "ternary": "2 bits (or 5 per byte with packing='base3')",
        "power": "2..8 bits, with exponent=a",
        "codebook": "1..8 bits, 2^bits values given in codebook=[...], or fitted to each tensor when it is None",
    }


def default_bits(name: str, codebook: Sequence[float] | None = None) -> int:
    """The width a format implies when the user names none. Raises ValueError for an unknown format."""
    if not isinstance(name, str):
        raise ValueError(f"a number format is given by its name, not {name!r}")
    if name == "ternary":
        return 2
    if name in ("float8_e4m3fn", "float8_e5m2", "fp_e4m3fn"):
        return 8
    if split := floating_point(name):
        return split.bits
    if name == "codebook" and isinstance(codebook, Sequence):
        return max(1, (len(codebook) - 1).bit_length())
    if name in format_names():
        return 4
    raise ValueError(unknown("number format", name, format_names()))


@lru_cache(maxsize=256)
def get_format(
    name: str, bits: int, exponent: float | None = None, codebook: tuple[float, ...] | None = None
) -> NumberFormat:
    """Look up a format by name and width.

    Args:
        name: one of :func:`format_names`.
        bits: code width; must agree with the name where the name fixes it.
        exponent: the power exponent a of ``power``, 0 < a <= 4.
        codebook: 2^bits finite values of ``codebook``, ascending and distinct.

    Raises:
        ValueError: unknown name, a width the format does not have, or a missing or invalid parameter.
    """
    with torch.device("cpu"):  # models are built under another default device, mostly "meta"
        return _make_format(name, bits, exponent, codebook)


def _make_format(name: str, bits: int, exponent: float | None, codebook: tuple[float, ...] | None) -> NumberFormat:
    if name == "fp_e4m3fn":
        name = "float8_e4m3fn"
    expected = default_bits(name, codebook)
    if name == "int":
        _check_bits(name, bits, 1, 8)
        return NumberFormat(name, bits, tables.integer(bits))
    if name == "nf":
        _check_bits(name, bits, 2, 4)
        return NumberFormat(name, bits, tables.normal_float(bits))
    if name == "lloyd":
        _check_bits(name, bits, 2, 4)
        return NumberFormat(name, bits, tables.lloyd_max(bits))
    if name == "power":
        _check_bits(name, bits, 2, 8)
        if exponent is None:
            raise ValueError(
                "format 'power' needs an exponent: give exponent=a, or take a method that searches it, such as nupes"
            )
        if not 0 < exponent <= 4:
            raise ValueError(f"format 'power' needs an exponent with 0 < exponent <= 4, got {exponent}")
        return NumberFormat(name, bits, tables.power(bits, exponent))
    if name == "fp":
        _check_bits(name, bits, min(SPLITS), max(SPLITS))
        raise ValueError(
            f"format 'fp' leaves exponent and mantissa open: name them (for example {SPLITS[bits][1]!r}), or take a "
            "method that searches them, such as fp_diffusion"
        )
    if name == "codebook":
        _check_bits(name, bits, 1, 8)
        return NumberFormat(name, bits, _codebook_table(bits, codebook))
    if bits != expected:
        raise ValueError(f"format {name!r} has {expected} bits, not bits={bits}")
    if name == "ternary":
        return NumberFormat(name, bits, tables.ternary())
    if name in _TORCH_FLOAT8:
        return NumberFormat(name, bits, tables.torch_float8(_TORCH_FLOAT8[name]))
    split = floating_point(name)
    assert split is not None  # default_bits accepted the name
    if split.exponent_bits < 1 or not 2 <= expected <= 8:
        raise ValueError(f"format {name!r} is not one of 2..8 bits with at least one exponent bit")
    return NumberFormat(name, bits, tables.floating_point(split.exponent_bits, split.mantissa_bits, split.signed))


def _check_bits(name: str, bits: int, low: int, high: int) -> None:
    if not low <= bits <= high:
        raise ValueError(f"format {name!r} allows {low} to {high} bits, not bits={bits}")


def _codebook_table(bits: int, codebook: tuple[float, ...] | None) -> Tensor:
    if codebook is None:
        raise ValueError(
            "this codebook is fitted to each tensor: its table is stored with the weight, not in the config"
        )
    table = torch.tensor(codebook, dtype=torch.float32)
    if len(codebook) != 2**bits:
        raise ValueError(f"a codebook of {bits} bits has {2**bits} values, not {len(codebook)}")
    if (
        not bool(torch.isfinite(table).all())
        or not bool((table[1:] > table[:-1]).all())
        or not bool(table.abs().max() > 0)
    ):
        raise ValueError("a codebook's values must be finite, distinct and in ascending order")
    return table
