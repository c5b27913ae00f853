"""Two pictures of a comparison: a grid of what was drawn, and quality against size."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_lowbit.evaluation.figure import new_figure

_CELL, _MARGIN, _HEAD = 1.15, 1.6, 0.75  # inches
_PIXELS = 300  # of a cell at least, where small pictures are enlarged
# The panels of a Pareto plot that were measured: name -> (title, whether less is better).
_PANELS = {
    "ssim": ("SSIM to the float pictures", False),
    "psnr": ("PSNR to the float pictures, dB", False),
    "fid": ("Fréchet distance to the float pictures", True),
    "agreement": ("pictures that show what was asked, %", False),
}
_MOST_PANELS = 3


def draw_grid(columns: Mapping[str, Tensor], prompts: Sequence[Any], path: str | Path) -> None:
    """Rows are prompts, columns pipelines; small pictures are enlarged pixel by pixel.

    Args:
        columns: label -> pictures [at least as many as prompts, c, h, w] in [0, 1].
        prompts: a text or class label for each row.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = len(prompts)
    figure = new_figure(_MARGIN + _CELL * len(columns), _HEAD + _CELL * rows)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (label, pictures) in enumerate(columns.items()):
        for row in range(rows):
            axes = grid[row][column]
            values = pictures[row].permute(1, 2, 0).numpy()
            grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if values.shape[-1] == 1 else {}
            axes.imshow(values.squeeze(-1) if grey else values, interpolation="nearest", **grey)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column == 0:
                text = textwrap.fill(str(prompts[row]), 16)
                axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
        grid[0][column].set_title(_wrapped(label), fontsize=8)
    figure.savefig(path, dpi=max(150, round(_PIXELS / _CELL)) if rows * len(columns) <= 120 else 150)


def draw_pareto(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Quality against the size of the denoiser, a panel for each metric; a line joins what no smaller one beats.

    Args:
        rows: of a comparison, the reference first: its size is a dashed line, its agreement too.

    Raises:
        ImportError: matplotlib is not installed.
    """
    reference, *others = rows
    names = [name for name in _PANELS if any(name in row for row in others)]
    if len(names) > _MOST_PANELS:
        names.remove("psnr")
    figure = new_figure(0.6 + 4.4 * len(names), 4.2)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        caption, less = _PANELS[name]
        scale = 100 if name == "agreement" else 1
        shown = [(row["denoiser_bytes"] / 1e6, scale * row[name], row["label"]) for row in others if name in row]
        for size, value, label in shown:
            axes.plot(size, value, "o", markersize=6)
            axes.annotate(
                label, (size, value), textcoords="offset points", xytext=(5, 4), fontsize=7, annotation_clip=False
            )
        front = pareto_front([(size, value if less else -value) for size, value, _ in shown])
        edge = [shown[index] for index in front]
        axes.plot([e[0] for e in edge], [e[1] for e in edge], color="0.6", linewidth=1, zorder=0)
        axes.axvline(reference["denoiser_bytes"] / 1e6, color="0.5", linestyle="--", linewidth=1)
        if name == "agreement":
            axes.axhline(scale * next(row["reference_agreement"] for row in others if name in row),
                         color="0.5", linestyle="--", linewidth=1)  # fmt: skip
        axes.margins(0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("denoiser as stored, MB")
        axes.set_title(f"{caption} ({'less' if less else 'more'} is better)", fontsize=9, loc="left")
        axes.grid(True, color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}; dashed: {reference['label']}", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (size, loss) that no other of at most the same size matches in loss; by size."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.fill(line, 15, break_on_hyphens=True) for line in label.splitlines())
