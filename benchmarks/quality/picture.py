"""One picture of the rows: KL against bits per weight, a line for each variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def nominal_bits(bits: int, group: int | None, symmetric: bool) -> float:
    """Bits per weight of codes, a 16-bit scale for each group and, if not symmetric, a zero point as wide as a code.

    For peers, whose files are not counted. A scale for each row counts as none.
    """
    return bits + (0 if group is None else (16 + (0 if symmetric else bits)) / group)


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Rows that failed are left out."""
    from hf_lowbit.evaluation import draw_quality, points_of

    draw_quality(points_of(rows, "the benchmark"), path, title=title)
