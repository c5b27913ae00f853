"""ActivationSpec: how a layer's input is quantized, as plain data that goes into the config."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from hf_lowbit.formats.spec import SpecError, spec_from_dict

# A config's fields for it, in the order of activation_of's arguments.
ACTIVATION_FIELDS = (
    "activation_bits", "activation_format", "activation_symmetric", "activation_group_size", "activation_static",
)  # fmt: skip


@dataclass(frozen=True)
class ActivationSpec:
    """Quantization of a layer's input: by default with a scale of each token's own, made as it comes.

    Attributes:
        format, bits: "int" of 4, 6 or 8 bits, or "float8_e4m3fn".
        symmetric: False adds a zero point per scale: the codes cover the token's (or group's) own range, from its
            smallest to its largest value, both with zero, so that inputs which are never negative have all codes to
            themselves. Of 4 and 6 bits only: less their zero point these codes are still int8, so that the same
            products serve; those of 8 bits are not, and a float has no zero point.
        group_size: g inputs of a token share a scale (SVDQuant, arXiv 2411.05007: 64 of 4 bits); None: all of them.
        static: one scale for the whole tensor, found on calibration data and stored with the layer (SmoothQuant's O3,
            arXiv 2211.10438): nothing is measured at inference, and what exceeds it is clipped.
    """

    format: str = "int"
    bits: int = 8
    symmetric: bool = True
    group_size: int | None = None
    static: bool = False
    json: ClassVar[str]  # of each instance: to_dict as text, made once

    def __post_init__(self) -> None:
        allowed = (("int", 4), ("int", 6), ("int", 8), ("float8_e4m3fn", 8))
        if type(self.bits) is not int or (self.format, self.bits) not in allowed:
            raise SpecError(
                "activations are quantized to format 'int' with 4, 6 or 8 bits or to 'float8_e4m3fn', "
                f"not to {self.format!r} with {self.bits} bits"
            )
        for name in ("symmetric", "static"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise SpecError(
                f"the group size of activations must be a positive integer or None, not {self.group_size!r}"
            )
        if not self.symmetric and self.bits == 8:
            reason = "less their zero point they need 9 bits" if self.format == "int" else "a float has no zero point"
            raise SpecError(f"asymmetric activations have 4 or 6 bits of format 'int', not {self}: {reason}")
        if self.static and (self.group_size is not None or not self.symmetric):
            raise SpecError(
                f"static activations are symmetric with one scale for the tensor, not {self}: leave out the groups and "
                "the zero point, or static"
            )
        object.__setattr__(self, "json", json.dumps(self.to_dict()))

    def __str__(self) -> str:
        parts = [f"{self.format} {self.bits} bits"]
        parts += ["asymmetric"] if not self.symmetric else []
        parts += [f"groups of {self.group_size}"] if self.group_size is not None else []
        return ", ".join(parts + (["static"] if self.static else []))

    @property
    def limit(self) -> float:
        """The largest magnitude of a symmetric code."""
        if self.format == "float8_e4m3fn":
            return torch.finfo(torch.float8_e4m3fn).max
        return 2.0 ** (self.bits - 1) - 1

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
        return {name: getattr(self, name) for name in chosen}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActivationSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for unknown fields."""
        return spec_from_dict(cls, values)


def activation_of(
    bits: int | None, format: str | None, symmetric: bool, group_size: int | None, static: bool
) -> ActivationSpec | None:
    """What a config's fields ask for; None for full precision, where neither width nor format is given."""
    if bits is None and format is None:
        return None
    name = "int" if format is None else format
    width = 8 if bits is None else bits
    return ActivationSpec("float8_e4m3fn" if name == "fp_e4m3fn" else name, width, symmetric, group_size, static)


def inherited_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields that a layer's overrides take back to their defaults, because they cannot go with what these set."""
    values: dict[str, Any] = {}
    if overrides.get("activation_bits") == 8 or "activation_format" in overrides or overrides.get("activation_static"):
        values["activation_symmetric"] = True
    if overrides.get("activation_static"):
        values["activation_group_size"] = None
    if overrides.get("activation_group_size") or overrides.get("activation_symmetric") is False:
        values["activation_static"] = False
    return values
