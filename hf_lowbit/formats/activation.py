"""ActivationSpec: how a layer's input is quantized, as plain data that goes into the config."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch

from hf_lowbit.formats.floating_point import SPLITS, USUAL_SPLIT, FloatingPoint, floating_point
from hf_lowbit.formats.spec import SpecError, spec_from_dict

# A config's fields for it, in the order of activation_of's arguments.
ACTIVATION_FIELDS = (
    "activation_bits", "activation_format", "activation_symmetric", "activation_group_size", "activation_static",
    "activation_timesteps", "activation_shift",
)  # fmt: skip
_OTHER_FORMATS = (("int", 4), ("int", 6), ("int", 8), ("float8_e4m3fn", 8))


@dataclass(frozen=True)
class ActivationSpec:
    """Quantization of a layer's input: by default with a scale of each token's own, made as it comes.

    Attributes:
        format, bits: "int" of 4, 6 or 8 bits, "float8_e4m3fn", or a floating-point format of 4 to 8 bits that is finite
            throughout: "fp_eXmY", or without a sign "ufp_eXmY". "fp" is a static one whose split of exponent and
            mantissa is still to be found in the data (:attr:`is_open`); where scales are made as inputs come, the usual
            split of the width.
        symmetric: False adds a zero point per scale: the codes cover the token's (or group's) own range, from its
            smallest to its largest value, both with zero, so that inputs which are never negative have all codes to
            themselves. Of "int" only. Zero is exactly representable.
        group_size: g inputs of a token share a scale (SVDQuant, arXiv 2411.05007: 64 of 4 bits); None: all of them.
        static: scales are found on calibration data and stored with the layer, one for the whole tensor or one for
            each group of inputs (SmoothQuant's O3, arXiv 2211.10438): nothing is measured at inference, and what
            exceeds them is clipped.
        timesteps: static scales of each of these timesteps of a diffusion model, the largest first: those of the
            nearest are used (QuEST, arXiv 2402.03666). ``()``: of the timesteps that the data has. None: of no
            timestep.
        shift: static floating-point codes lie around a stored centre: for inputs after SiLU or GELU, which have a long
            positive and a short negative side.
    """

    format: str = "int"
    bits: int = 8
    symmetric: bool = True
    group_size: int | None = None
    static: bool = False
    timesteps: tuple[float, ...] | None = None
    shift: bool = False
    json: ClassVar[str]  # of each instance: to_dict as text, made once

    def __post_init__(self) -> None:
        if self.format == "fp" and self.bits in tuple(SPLITS) and self.static is False:
            object.__setattr__(self, "format", USUAL_SPLIT[self.bits])
        if type(self.bits) is not int or not self._has_format():
            raise SpecError(
                "activations are quantized to format 'int' with 4, 6 or 8 bits, to 'float8_e4m3fn', or to 'fp', "
                f"'fp_eXmY' or 'ufp_eXmY' with 4 to 8 bits, not to {self.format!r} with {self.bits} bits"
            )
        for name in ("symmetric", "static", "shift"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise SpecError(
                f"the group size of activations must be a positive integer or None, not {self.group_size!r}"
            )
        if not self.symmetric and self.format != "int":
            raise SpecError(f"asymmetric activations are of format 'int', not {self}: a float has no zero point")
        if self.shift and (self.format == "int" or not self.static):
            raise SpecError(
                f"a shift is of static activations of a floating-point format, not of {self}: those of 'int' have a "
                "zero point instead (symmetric=False)"
            )
        if self.timesteps is not None:
            self._check_timesteps(self.timesteps)
        object.__setattr__(self, "json", json.dumps(self.to_dict()))

    def _has_format(self) -> bool:
        if self.bits in SPLITS and (split := self.floating_point) is not None:
            return split.bits == self.bits and 1 <= split.exponent_bits <= 5
        return (self.format, self.bits) in _OTHER_FORMATS

    def _check_timesteps(self, given: Any) -> None:
        if not isinstance(given, tuple | list) or any(type(t) not in (int, float) or not _is_time(t) for t in given):
            raise SpecError(f"timesteps must be finite numbers of at least 0, not {given!r}")
        values = tuple(int(t) if t == int(t) else t for t in given)  # equal tables have equal specifications
        if any(first <= second for first, second in pairwise(values)):
            raise SpecError(f"timesteps must be distinct and in the order of denoising, the largest first: {values}")
        object.__setattr__(self, "timesteps", values)
        if not self.static:
            raise SpecError(f"scales of timesteps are static ones, not those of {self}: set static")

    def __str__(self) -> str:
        parts = [f"{self.format} {self.bits} bits"]
        parts += ["asymmetric"] if not self.symmetric else []
        parts += ["shifted"] if self.shift else []
        parts += [f"groups of {self.group_size}"] if self.group_size is not None else []
        parts += ["static"] if self.static else []
        parts += [f"{len(self.timesteps) or 'its'} timesteps"] if self.timesteps is not None else []
        return ", ".join(parts)

    @property
    def has_shift(self) -> bool:
        """Whether codes have a shift beside their scale: x is about scale * codes + shift.

        Not those of 4 and 6 bits with a zero point of each token: less that, they are int8 too.
        """
        return self.shift or (not self.symmetric and (self.static or self.bits == 8))

    @property
    def brings_scales(self) -> bool:
        """Whether inputs become symmetric integers with scales that are made as they come: none are stored."""
        return self.format == "int" and self.symmetric and not self.static

    @property
    def floating_point(self) -> FloatingPoint | None:
        """The small floating-point format, where it is one; the usual one of its width while it is open."""
        return floating_point(USUAL_SPLIT[self.bits] if self.is_open else str(self.format))

    @property
    def is_open(self) -> bool:
        """True while the split of a floating-point format is still to be found in the data."""
        return self.format == "fp"

    @property
    def limit(self) -> float:
        """The largest magnitude of a symmetric code."""
        if (split := self.floating_point) is not None:
            return split.limit
        if self.format == "float8_e4m3fn":
            return torch.finfo(torch.float8_e4m3fn).max
        return 2.0 ** (self.bits - 1) - 1

    def dynamic(self) -> ActivationSpec:
        """The same with scales that are made as inputs come."""
        return replace(self, static=False, timesteps=None, shift=False)

    def groups(self, columns: int) -> int:
        """Scales per token of ``columns`` inputs. Raises SpecError when the group does not divide them."""
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise SpecError(f"activations in groups of {self.group_size}, which do not divide {columns} inputs")
        return columns // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """Plain data; all but format and bits only where they differ from the defaults."""
        always = ("format", "bits")
        chosen = [f.name for f in fields(self) if f.name in always or getattr(self, f.name) != f.default]
        values = {name: getattr(self, name) for name in chosen}
        return values if self.timesteps is None else {**values, "timesteps": list(self.timesteps)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActivationSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for unknown fields."""
        return spec_from_dict(cls, values)


def activation_of(
    bits: int | None,
    format: str | None,
    symmetric: bool,
    group_size: int | None,
    static: bool,
    timesteps: bool = False,
    shift: bool = False,
) -> ActivationSpec | None:
    """What a config's fields ask for; None for full precision, where neither width nor format is given."""
    if bits is None and format is None:
        return None
    name = "int" if format is None else format
    split = floating_point(name) if isinstance(name, str) else None
    width = bits if bits is not None else 8 if split is None else split.bits
    name = "float8_e4m3fn" if name == "fp_e4m3fn" else name
    return ActivationSpec(name, width, symmetric, group_size, static, () if timesteps else None, shift)


def inherited_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields that a layer's overrides take back to their defaults, because they cannot go with what these set."""
    values: dict[str, Any] = {}
    format = overrides.get("activation_format", "")
    if format not in ("", "int", None):  # a float has no zero point
        values["activation_symmetric"] = True
    if format in ("int", None):  # nor integers a shift
        values["activation_shift"] = False
    if overrides.get("activation_static") is False:
        values |= {"activation_timesteps": False, "activation_shift": False}
    return values


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value >= 0
