"""Pictures of what quantization costs: quality against bits per weight, and the error of each layer.

They need matplotlib, which the extra ``eval`` brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowbit.evaluation.figure import new_figure as _figure
from hf_lowbit.evaluation.layer_errors import Panel
from hf_lowbit.evaluation.points import METRICS, Point, SourceError
from hf_lowbit.suggestion import unknown

SUFFIXES = (".png", ".svg", ".pdf")
_TITLES = {
    "kl": "KL(float || quantized), nats per token",
    "perplexity": "perplexity",
    "top1_agreement": "next tokens that agree with the float model's, %",
}
_MARKERS = "osD^vPX*<>"
_COLUMNS = 4


def check_picture(path: str | Path, metric: str = "kl") -> None:
    """Before any work: the picture can be drawn and written there.

    Raises:
        ImportError: matplotlib is not installed.
        SourceError: another suffix than one of :data:`SUFFIXES`, a folder that does not exist, or another metric than
            one of :data:`METRICS`.
    """
    _figure(1, 1)
    if Path(path).suffix.lower() not in SUFFIXES:
        raise SourceError(f"a picture is written as {', '.join(SUFFIXES)}, not {Path(path).name!r}")
    if not Path(path).absolute().parent.is_dir():
        raise SourceError(f"there is no folder {str(Path(path).parent)!r} to write {Path(path).name} in")
    if metric not in METRICS:
        raise SourceError(unknown("metric", metric, METRICS))


def draw_quality(points: Sequence[Point], path: str | Path, metric: str = "kl", title: str = "") -> None:
    """Quality against bits per weight: a line for each label, bars for 95 % intervals.

    KL and perplexity have a logarithmic axis.

    Args:
        points: that all have the metric; of perplexity also the float model's is drawn, where points know it.
        metric: one of :data:`METRICS`.

    Raises:
        ImportError: matplotlib is not installed.
        SourceError: another metric, a point without it, a divergence that is not positive, or no point.
    """
    check_picture(path, metric)
    _check_points(points, metric)
    scale = 100.0 if metric == "top1_agreement" else 1.0
    labels = sorted({point.label for point in points})
    figure = _figure(8, 5)
    axes = figure.subplots()
    for index, label in enumerate(labels):
        own = sorted((point for point in points if point.label == label), key=lambda point: point.bits_per_weight)
        axes.errorbar(
            [point.bits_per_weight for point in own],
            [scale * point.values[metric] for point in own],
            [[scale * length for length in side] for side in zip(*(_bar(point, metric) for point in own), strict=True)],
            **_style(index),
            markersize=5, linewidth=1, elinewidth=1, capsize=2, alpha=0.85, label=label,
        )  # fmt: skip
    if metric == "perplexity":
        for value in sorted({round(p.values["reference_perplexity"], 3) for p in points if _knows_float(p)}):
            axes.axhline(value, color="0.5", linestyle="--", linewidth=1, label=f"float: {value:g}")
    if metric != "top1_agreement":
        _logarithmic(axes)
    axes.set_xlabel("bits stored per quantized weight (codes, scales, tables)")
    axes.set_ylabel(_TITLES[metric])
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, title="bars: 95 % interval", title_fontsize=8)
    figure.savefig(path, dpi=150)


def draw_layer_errors(models: Mapping[str, Sequence[Panel]], path: str | Path, title: str = "") -> None:
    """Relative weight errors: a small panel for each kind of layer, a line for each model, one scale for all.

    Args:
        models: name -> panels (:func:`hf_lowbit.evaluation.layer_errors.panels_of`).

    Raises:
        ImportError: matplotlib is not installed.
        SourceError: nothing to draw.
    """
    check_picture(path)
    kinds = list(dict.fromkeys(panel.kind for panels in models.values() for panel in panels))
    if not kinds:
        raise SourceError("no layer has a measured error")
    columns = min(_COLUMNS, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = _figure(max(2.6 * columns, 5), 2.1 * rows + 0.9)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        for index, panels in enumerate(models.values()):
            panel = next((panel for panel in panels if panel.kind == kind), None)
            if panel is not None:
                axes.plot(panel.places, panel.errors, **_style(index), markersize=3, linewidth=1)
        axes.set_title(kind, fontsize=9, loc="left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if max(len(panel.places) for panels in models.values() for panel in panels if panel.kind == kind) == 1:
            axes.set_xticks([])  # outside the blocks
        axes.grid(True, color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in list(grid.flat)[len(kinds) :]:
        axes.set_visible(False)
    grid[0][0].set_ylim(bottom=0)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel("relative weight error ||W - Q|| / ||W||", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if len(models) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], **_style(i), markersize=4, label=name) for i, name in enumerate(models)]
        figure.legend(handles=handles, loc="outside upper right", ncols=min(3, len(models)), fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def _check_points(points: Sequence[Point], metric: str) -> None:
    if not points:
        raise SourceError("there is nothing to plot")
    for point in points:
        if metric not in point.values:
            need = "" if metric == "perplexity" else " (it needs --reference)"
            raise SourceError(f"{point.label} at {point.bits_per_weight:.3g} bits was evaluated without {metric}{need}")
        if metric == "kl" and point.values["kl"] <= 0:
            raise SourceError(
                f"{point.label} at {point.bits_per_weight:.3g} bits has a KL of {point.values['kl']:g}, which has no "
                "place on a logarithmic axis: is its reference the model itself?"
            )


def _bar(point: Point, metric: str) -> tuple[float, float]:
    """How far its interval reaches below and above a value; none where it was not measured."""
    value = point.values[metric]
    low, high = point.intervals.get(metric, (value, value))
    return max(value - low, 0.0), max(high - value, 0.0)


def _knows_float(point: Point) -> bool:
    return "reference_perplexity" in point.values


def _style(index: int) -> dict[str, Any]:
    """Ten colours, each with a marker; beyond, with another one and another kind of line."""
    from matplotlib import colormaps

    turn = index // 10
    return {
        "color": colormaps["tab10"](index % 10),
        "marker": _MARKERS[(index + turn) % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[turn % 3],
    }


def _logarithmic(axes: Any) -> None:
    """Ticks at 1, 2 and 5, or where there would be too few of them at round distances; as plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 6 * low else MaxNLocator(8))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
