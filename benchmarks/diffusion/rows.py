"""What is compared: names, methods and their configs' fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEEDS = {"float": 0, "float-seed-b": 100_000, "float-seed-c": 200_000}  # of each float row's first picture
REFERENCE, OTHER = "float", "float-seed-b"
# One stored scale and zero point for each layer's input, from its smallest to its largest value.
STATIC = {"activation_bits": 8, "activation_symmetric": False, "activation_static": True}
GROUPS_OF_32 = {
    "group_size": 32, "activation_bits": 4, "activation_group_size": 32, "activation_symmetric": False,
    "activation_static": True,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        name: of the row.
        method: of hf_lowbit; "float" for none.
        fields: of its config.
        search: arguments of ``search_pipeline``, which then finds the bits; None without a search.
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None

    @property
    def turn(self) -> str:
        """Rows of one turn run one after the other: searches share what they have measured, and the other float rows
        are held against the first.
        """
        if self.method == "float":
            return "float"
        return "search" if self.search is not None else self.name


def all_rows() -> dict[str, Row]:
    """By name; the float ones first, which the others are held against."""
    return {row.name: row for row in _rows()}


def quick_fields(known: set[str]) -> dict[str, Any]:
    """Of the fields that a config has, those that make it train next to nothing, and change next to nothing."""
    values = {"iterations": 2, "learning_rate": 1e-3, "epochs": 1, "smooth_steps": 2}
    return {name: value for name, value in values.items() if name in known}


QUICK_SEARCH = {"pictures": 2, "samples": 4, "scan": (1, 1), "candidates": (4, 8)}


def _rows() -> Iterator[Row]:
    for name in SEEDS:
        yield Row(name, "float")
    yield from _nearest()
    yield from _floating_point()
    yield from _mixed()
    yield Row("adaround-w4a8", "adaround", {"bits": 4, **STATIC})
    yield Row("adaround-w4a4", "adaround", {"bits": 4, **GROUPS_OF_32})
    yield Row("quest-w8a8", "quest", {"bits": 8})
    yield Row("quest-w4a8", "quest", {"bits": 4})
    yield Row("quest-w4a4", "quest", {"bits": 4, "activation_bits": 4})
    yield Row("quest-w4a4-start", "quest", {"bits": 4, "activation_bits": 4, "epochs": 0})
    yield Row("q_diffusion-w8a8", "q_diffusion", {"bits": 8})
    yield Row("q_diffusion-w4a8", "q_diffusion", {"bits": 4})
    yield Row("vidit_q-w8a8", "vidit_q", {"bits": 8})
    yield Row("vidit_q-w4a8", "vidit_q", {"bits": 4})
    yield Row("svdquant-w4a4", "svdquant")
    # A branch of rank 32 is larger than the 4-bit weights of layers as small as these.
    yield Row("svdquant-w4a4-r8", "svdquant", {"low_rank": {"rank": 8, "factor_bits": 8}})
    yield Row("svdquant-w4a16", "svdquant", {"activation_bits": None})


def _nearest() -> Iterator[Row]:
    """Rounding to nearest, with scales per row unless told otherwise."""
    w8, w4 = {"bits": 8, "group_size": None}, {"bits": 4, "group_size": None}
    yield Row("rtn-w8a8", "rtn", {**w8, "activation_bits": 8})
    yield Row("rtn-w8a8-static", "rtn", {**w8, **STATIC})
    yield Row("rtn-w8a8-static-tensor", "rtn", {**w8, **STATIC, "group_size": "tensor"})
    yield Row("rtn-w4a16", "rtn", w4)
    yield Row("rtn-w4a8", "rtn", {**w4, "activation_bits": 8})
    yield Row("rtn-w4a8-static", "rtn", {**w4, **STATIC})
    yield Row("rtn-w4a4", "rtn", {"bits": 4, **GROUPS_OF_32})
    yield Row("rtn-fp4-fp8", "rtn", {**w4, "format": "fp_e2m1", "activation_format": "float8_e4m3fn"})


def _floating_point() -> Iterator[Row]:
    """FP4 with learned rounding against nearest FP4 and nearest INT4, which differ in nothing else."""
    yield Row("fp_diffusion-w8a8", "fp_diffusion", {"bits": 8})
    yield Row("fp_diffusion-w6a6", "fp_diffusion", {"bits": 6, "activation_bits": 6})
    yield Row("fp_diffusion-w4a8", "fp_diffusion", {"bits": 4})
    yield Row("fp_diffusion-w4a8-nearest", "fp_diffusion", {"bits": 4, "iterations": 0})
    yield Row("fp_diffusion-w4a8-int-nearest", "fp_diffusion", {"bits": 4, "iterations": 0, "format": "int"})


def _mixed() -> Iterator[Row]:
    """MixDQ: uniform bits, and those that its search finds within a mean."""
    yield Row("mixdq-w8a8", "mixdq", {"bits": 8})
    yield Row("mixdq-w8a8-no-bos", "mixdq", {"bits": 8, "bos_aware": False})
    yield Row("mixdq-w5a8", "mixdq", {"bits": 5})
    yield Row("mixdq-w4a8", "mixdq", {"bits": 4})
    for bits in (4, 5):
        # Inputs have 8 bits in all of these rows: what differs is how bits of weights are spread.
        yield Row(f"mixdq-mixed-{bits}", "mixdq", {}, {"bits_per_weight": float(bits), "bits_per_input": None})
