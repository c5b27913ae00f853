"""One picture: 4-bit products by number of tokens beside the peers', and decode speeds of whole models.

    python -m gpu.picture RESULT.json [MORE.json ...] PICTURE.png      (in benchmarks/)

draws it of results that are there; of models of one shape those of the last file that has them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.table import WAYS
from hf_lowbit.evaluation.figure import new_figure

OURS = "int4 g128"
_COLOURS = {"eager": "#9aa5b1", "compiled": "#d9a441", "graph_1": "#1f6fb4"}
_BAR = 0.27


def draw(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each of two matrices, and one for the models, of what was measured."""
    products = [row for row in report["rows"] if "us" in row and row["tokens"] <= 256]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in products))
    shapes = [shapes[0], shapes[-1]] if len(shapes) > 1 else shapes
    models = [row for row in report["models"] if "tokens_per_s" in row["graph_1"]]
    count = len(shapes) + bool(models)
    if not count:
        return
    figure = new_figure(5.4 * count, 4.4)
    panels = figure.subplots(1, count, squeeze=False)[0]
    peers = list(dict.fromkeys(row["weight"] for row in products if "copy_us" not in row))
    for axes, shape in zip(panels, shapes, strict=False):
        _products(axes, shape, [row for row in products if tuple(row["shape"]) == shape], peers)
    if models:
        _models(panels[-1], models)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{report['device']}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)


def _products(axes: Any, shape: tuple[int, ...], rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> None:
    """Peers keep their colours from panel to panel, whichever were measured."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["weight"] == OURS or "copy_us" not in row:  # of ours one, of the peers all
            lines.setdefault(row["weight"], {})[row["tokens"]] = row["us"]
            lines.setdefault("bfloat16, torch", {})[row["tokens"]] = row["bfloat16_us"]
    for name, times in lines.items():
        own, tokens = name == OURS, sorted(times)
        label = f"hf_lowbit, {OURS}" if own else name
        index = peers.index(name) if name in peers else None
        colour = f"C{index + 1}" if index is not None else "#1f6fb4" if own else "0.35"
        axes.plot(
            tokens, [times[count] for count in tokens], marker="o" if index is None else "sD^vPX*"[index % 7],
            markersize=5, label=label, color=colour, linewidth=2.2 if own else 1.2, zorder=3 if own else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = sorted({row["tokens"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("tokens")
    axes.set_title(f"{shape[0]} x {shape[1]}: microseconds of a product", loc="left", fontsize=10)
    axes.grid(True, color="0.92", linewidth=0.8)


def _models(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for index, (way, colour) in enumerate(_COLOURS.items()):
        places = [place for place, row in enumerate(rows) if "tokens_per_s" in row.get(way, {})]
        if not places:
            continue
        speeds = [rows[place][way]["tokens_per_s"] for place in places]
        heights = [place + (index - 1) * _BAR for place in places]
        axes.barh(heights, speeds, height=_BAR, color=colour, label=WAYS[way])
        for height, speed in zip(heights, speeds, strict=True):
            axes.text(speed, height, f" {speed:.0f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{row['shape']} {row['variant']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("decode, one sequence: tokens per second", loc="left", fontsize=10)


def together(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first report, with the models of the others."""
    models: dict[str, list[Any]] = {}
    for report in reports:
        models |= {shape: [m for m in report["models"] if m["shape"] == shape] for shape in _shapes(report)}
    return {**reports[0], "models": [model for same in models.values() for model in same]}


def _shapes(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(model["shape"] for model in report["models"]))


if __name__ == "__main__":
    *results, picture = map(Path, sys.argv[1:])
    draw(together([json.loads(result.read_text()) for result in results]), picture)
