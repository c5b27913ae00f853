"""Specifications: all that a reload needs to know of one tensor, as plain data that goes into the config."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch

from hf_lowbit.formats.floating_point import SPLITS
from hf_lowbit.formats.number_format import NumberFormat, get_format
from hf_lowbit.formats.packing import packed_columns

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GroupSize = int | Literal["tensor"] | None


class SpecError(ValueError):
    """A specification that cannot be: unknown fields, or values out of range."""


def bit_pattern_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type that stores a float's bits: loaders cast floats, they leave integers alone."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]


@dataclass(frozen=True)
class WeightSpec:
    """How one weight is stored: number format, granularity and packing.

    Attributes:
        format, bits, exponent, codebook: the number format (see :func:`hf_lowbit.formats.get_format`); a codebook
            of None is fitted to the tensor and stored with it; an exponent of None, and the split of "fp", are still
            to be searched (:attr:`is_open`).
        group_size: g weights along the input share a scale; None: a whole row; "tensor": all of it.
        symmetric: False adds a zero point per scale, w = scale * (table[code] - zero_point).
        real_zero_point: asymmetric integers of more than one bit: store the zero point as a real number of
            ``scale_dtype``, as other tables do, and not as an integer of their own width.
        scale_dtype: bfloat16, float16 or float32; stored as its integer bit pattern.
        packing: "dense", or "base3" (five per byte) for ternary.
        scale_bits: 2 to 8: scales, and real zero points, are codes of that width themselves, with an offset and a step
            of ``scale_dtype`` for ``scale_group`` rows (:mod:`hf_lowbit.formats.second_level`); None: plain numbers.
        scale_group: consecutive rows that share such an offset and step.
        json: :meth:`to_dict` as text, made once: traced code cannot make it.
        first_level: the same with plain float32 scales, which hold the decoded ones exactly; itself where they are
            plain.
    """

    format: str = "int"
    bits: int = 4
    group_size: GroupSize = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    packing: str = "dense"
    exponent: float | None = None
    codebook: tuple[float, ...] | None = None
    real_zero_point: bool = False
    scale_bits: int | None = None
    scale_group: int = 16
    json: ClassVar[str]  # of each instance; not a field
    first_level: ClassVar[WeightSpec]  # likewise

    def __post_init__(self) -> None:
        self._check_parameters()
        if type(self.bits) is not int:
            raise SpecError(f"bits must be an integer, not {self.bits!r}")
        if type(self.symmetric) is not bool:
            raise SpecError(f"symmetric must be True or False, not {self.symmetric!r}")
        self._check_zero_point()
        if self.group_size == -1:
            raise SpecError("group_size=-1 is not accepted; use None for one scale per row")
        is_count = type(self.group_size) is int and self.group_size > 0
        if not (self.group_size is None or self.group_size == "tensor" or is_count):
            raise SpecError(
                f"group_size must be a positive integer, None (per row) or 'tensor', not {self.group_size!r}"
            )
        if self.scale_dtype not in tuple(SCALE_DTYPES):
            raise SpecError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, not {self.scale_dtype!r}")
        if self.packing not in ("dense", "base3"):
            raise SpecError(f"packing must be 'dense' or 'base3', not {self.packing!r}")
        if self.packing == "base3" and self.format != "ternary":
            raise SpecError(f"packing='base3' holds three values per code; format {self.format!r} has more")
        if self.format == "ternary" and not self.symmetric:
            raise SpecError("format 'ternary' is symmetric; symmetric=False needs another format")
        if self.has_fitted_table:
            if not 1 <= self.bits <= 8:
                raise SpecError(f"format 'codebook' allows 1 to 8 bits, not bits={self.bits}")
        else:
            try:
                self._check_format()
            except ValueError as error:
                raise SpecError(str(error)) from None
        self._check_second_level()
        plain = replace(self, scale_bits=None, scale_group=16, scale_dtype="float32") if self.scale_bits else self
        object.__setattr__(self, "json", json.dumps(self.to_dict()))
        object.__setattr__(self, "first_level", plain)

    def _check_format(self) -> None:
        """Raise ValueError for a number format that a weight cannot have."""
        if self.format == "fp" and self.bits in SPLITS:
            if not self.symmetric:
                raise SpecError("format 'fp' is symmetric: a search of its split knows no zero point")
            return
        if str(self.format).startswith("ufp"):
            raise SpecError(f"format {self.format!r} has no negative values: it is for inputs that have none")
        get_format(self.format, self.bits, 1.0 if self.is_open else self.exponent, self.codebook)

    def _check_parameters(self) -> None:
        """Exponent and codebook: of the right type, and given to the format that has them only."""
        for name, owner in (("exponent", "power"), ("codebook", "codebook")):
            if getattr(self, name) is not None and self.format != owner:
                raise SpecError(f"{name} belongs to format {owner!r}; format {self.format!r} has none")
        if self.exponent is not None and type(self.exponent) not in (int, float):
            raise SpecError(f"exponent must be a number, not {self.exponent!r}")
        if self.codebook is not None:
            given = self.codebook if isinstance(self.codebook, list | tuple) else [None]
            if not all(isinstance(value, int | float) for value in given):
                raise SpecError(f"codebook must be a list of numbers, not {self.codebook!r}")
            object.__setattr__(self, "codebook", tuple(float(value) for value in self.codebook))

    def _check_zero_point(self) -> None:
        if type(self.real_zero_point) is not bool:
            raise SpecError(f"real_zero_point must be True or False, not {self.real_zero_point!r}")
        if not self.real_zero_point:
            return
        if self.format != "int" or self.bits == 1:
            what = "format 'int' with one bit" if self.format == "int" else f"format {self.format!r}"
            raise SpecError(
                f"real_zero_point=True is for format 'int' with 2 to 8 bits; the zero points of {what} are real anyway"
            )
        if self.symmetric:
            raise SpecError("real_zero_point=True needs symmetric=False: symmetric formats have no zero point")

    def _check_second_level(self) -> None:
        if type(self.scale_group) is not int or self.scale_group < 1:
            raise SpecError(f"scale_group must be a positive integer, not {self.scale_group!r}")
        if self.scale_bits is None:
            if self.scale_group != 16:
                raise SpecError(f"scale_group={self.scale_group} needs scale_bits: plain scales are not grouped")
            return
        if type(self.scale_bits) is not int or not 2 <= self.scale_bits <= 8:
            raise SpecError(f"scale_bits must be 2 to 8, or None for plain scales, not {self.scale_bits!r}")
        if type(self.group_size) is not int:
            raise SpecError(
                f"scale_bits={self.scale_bits} needs a group_size in numbers: coarser scales take no space worth saving"
            )
        if self.scale_dtype == "float32":
            raise SpecError("scale_bits needs scale_dtype='bfloat16' or 'float16': offsets and steps have 16 bits")

    @property
    def is_open(self) -> bool:
        """True while the exponent of ``power``, or the split of ``fp``, is still to be searched: shapes are known."""
        return self.format == "fp" or (self.format == "power" and self.exponent is None)

    @property
    def has_fitted_table(self) -> bool:
        """True when the table belongs to the tensor and is stored with it (companion ``weight_table``)."""
        return self.format == "codebook" and self.codebook is None

    @property
    def number_format(self) -> NumberFormat:
        """The format this spec names. Raises ValueError when the table is fitted per tensor, or is still open."""
        return get_format(self.format, self.bits, self.exponent, self.codebook)

    @property
    def has_integer_zero_point(self) -> bool:
        """Integer grids have integer zero points, packed like codes, unless asked otherwise; other tables real ones."""
        return not self.symmetric and self.format == "int" and self.bits > 1 and not self.real_zero_point

    @property
    def has_coded_zero_point(self) -> bool:
        """Real zero points are codes where scales are."""
        return self.scale_bits is not None and not self.symmetric and not self.has_integer_zero_point

    def groups(self, columns: int) -> int:
        """Scales per row of ``columns`` inputs. Raises SpecError when the group does not divide the row."""
        if self.group_size is None or self.group_size == "tensor":
            return 1
        if columns % self.group_size:
            raise SpecError(f"group_size={self.group_size} does not divide the input width {columns}")
        return columns // self.group_size

    def row_groups(self, rows: int) -> int:
        """Offsets and steps per column of scales, where scales are codes; the last may serve fewer rows."""
        return -(-rows // self.scale_group)

    def companions(self, leading: tuple[int, ...], columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix -> (shape, dtype) of every stored tensor of a weight ``[*leading, columns]``; "" is the codes.

        ``leading`` is (rows,), or (experts, rows): experts keep one scale per row even for "tensor" granularity,
        because transformers splits and merges expert tensors along their first two dimensions.
        """
        scale_leading = (1,) if self.group_size == "tensor" and len(leading) == 1 else leading
        groups = self.groups(columns)
        scale_type = bit_pattern_dtype(SCALE_DTYPES[self.scale_dtype])
        stored = {"": ((*leading, packed_columns(columns, self.bits, self.packing)), torch.int32)}
        stored["_scale"] = ((*scale_leading, groups), scale_type)
        if self.has_integer_zero_point:
            stored["_zero_point"] = ((*scale_leading, packed_columns(groups, self.bits)), torch.int32)
        elif not self.symmetric:
            stored["_zero_point"] = ((*scale_leading, groups), scale_type)
        if self.scale_bits is not None:
            codes = ((*leading, packed_columns(groups, self.scale_bits)), torch.int32)
            ranges = ((*leading[:-1], self.row_groups(leading[-1]), groups, 2), scale_type)
            for suffix in ("_scale", "_zero_point") if self.has_coded_zero_point else ("_scale",):
                stored |= {suffix: codes, f"{suffix}_range": ranges}
        if self.has_fitted_table:
            stored["_table"] = ((2**self.bits,), torch.int32)
        return stored

    def to_dict(self) -> dict[str, Any]:
        """Fields that differ from the defaults, except that format, bits and group_size are always there."""
        always = ("format", "bits", "group_size")
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in always or getattr(self, f.name) != f.default
        }
        if self.codebook is not None:
            values["codebook"] = list(self.codebook)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for unknown fields."""
        return spec_from_dict(cls, values)


def spec_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """A specification from plain data. Raises SpecError for unknown fields."""
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise SpecError(f"unknown field(s) in a {cls.__name__}: {', '.join(unknown)}")
    return cls(**values)
