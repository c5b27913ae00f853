"""Quality against size: what a plot shows of each quantized model, read from where its evaluation was kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowbit.reporting import Report

METRICS = ("kl", "perplexity", "top1_agreement")


class SourceError(ValueError):
    """A file or folder that holds no evaluation of a quantized model."""


@dataclass(frozen=True)
class Point:
    """One quantized model.

    Attributes:
        label: of its method; points of one label are one line.
        bits_per_weight: stored for the quantized layers.
        values: of the evaluation, by its names: some of :data:`METRICS` and "reference_perplexity".
        intervals: name -> (low, high), 95 %.
    """

    label: str
    bits_per_weight: float
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def read_points(source: str | Path) -> list[Point]:
    """Points of a saved model, whose report holds an evaluation, or of a JSON file.

    The file holds what ``hf-lowbit evaluate --json`` printed for a quantized model, a list of such objects, or
    {"rows": list}, with "method" or "variant" in each; rows with "failed" are left out.

    Raises:
        SourceError: neither, or nothing in it was measured.
    """
    path = Path(source)
    if path.is_dir():
        return [_of_folder(path)]
    if not path.is_file():
        raise SourceError(f"there is no file or folder {str(source)!r}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from None
    rows = stored.get("rows", [stored]) if isinstance(stored, dict) else stored
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SourceError(f"{path} holds no evaluations: an object or a list of objects is needed")
    return points_of(rows, str(path))


def points_of(rows: Sequence[dict[str, Any]], where: str) -> list[Point]:
    """Points of rows as a file holds them; ``where`` they are from is for messages. Raises SourceError."""
    points = [_of_row(row, where) for row in rows if "failed" not in row]
    if not points:
        raise SourceError(f"{where} holds no evaluations")
    return points


def label_of(report: Report) -> str:
    """The method, and the type of quantized inputs where there are any."""
    types = {layer.activation for layer in report.layers} - {None}
    return ", ".join((report.method, *(f"inputs {name}" for name in sorted(filter(None, types)))))


def _of_folder(folder: Path) -> Point:
    report = Report.load(folder)
    if report is None:
        raise SourceError(f"{folder} holds no model that hf_lowbit saved: it has no report")
    if not any(name in report.evaluation for name in METRICS):
        raise SourceError(f"{folder} was not measured yet: hf-lowbit evaluate {folder} --reference FLOAT_MODEL --save")
    return _point(label_of(report), report.bits_per_weight, report.evaluation)


def _of_row(row: dict[str, Any], where: str) -> Point:
    label, bits = row.get("variant", row.get("method")), row.get("bits_per_weight")
    if not isinstance(label, str) or not _is_number(bits) or not any(_is_number(row.get(name)) for name in METRICS):
        raise SourceError(
            f'{where} holds an object without "method", "bits_per_weight" or one of {", ".join(METRICS)}: of a float '
            "model there is nothing to plot"
        )
    return _point(label, float(bits), row)  # type: ignore[arg-type]


def _point(label: str, bits: float, found: dict[str, Any]) -> Point:
    names = (*METRICS, "reference_perplexity")
    values = {name: float(found[name]) for name in names if _is_number(found.get(name))}
    intervals = {name: (float(pair[0]), float(pair[1])) for name, pair in found.get("intervals", {}).items()}
    return Point(label, bits, values, intervals)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
