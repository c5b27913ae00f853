"""A picture of the quality: divergence against size, a panel for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowbit.evaluation.figure import new_figure

_VARIANTS = ("nearest", "unrotated", "rotated", "no-groups", "neither", "kmeans", "mean", "99.95", "99.999")  # crowd it


def draw(models: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Model -> rows; those without a divergence or a size are left out, and variants that lie close to others."""
    figure = new_figure(7.5 * len(models), 6)
    for axes, (model, rows) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        shown = [row for row in rows if row["method"] != "float" and "kl" in row and "checkpoint_bytes" in row]
        shown = [row for row in shown if not row["name"].endswith(_VARIANTS)]
        for index, method in enumerate(dict.fromkeys(row["method"] for row in shown)):
            own = [row for row in shown if row["method"] == method]
            sizes, values = [row["checkpoint_bytes"] / 1e6 for row in own], [row["decode"]["kl"] for row in own]
            axes.plot(sizes, values, "osD^vPX*<>"[index % 10], markersize=7, label=method, alpha=0.8)
            for row, size, value in zip(own, sizes, values, strict=True):
                text = row["name"].removeprefix(f"{method}-")
                axes.annotate(text, (size, value), textcoords="offset points", xytext=(6, 2), fontsize=6.5)
        axes.set_yscale("log")
        axes.set_xlabel("checkpoint, MB (what is not packed in 16 bits)")
        axes.set_title(f"{model}: KL to the float model, token by token (less is better)", loc="left", fontsize=10)
        axes.grid(True, color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
