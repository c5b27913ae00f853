"""Two pictures of a run: distance against size, and what the rows draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.rows import SEEDS
from diffusion.settings import LABELS, Settings
from hf_lowbit.evaluation.figure import new_figure

_PANELS = (("fid", "Fréchet distance to the float pictures"), ("map_distance", "distance in the classifier's maps"))


def draw(rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Rows that failed are left out; the band is float against float with other seeds."""
    figure = new_figure(14, 6)
    for axes, (name, caption) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        methods = list(dict.fromkeys(row["method"] for row in rows if name in row and row["method"] != "float"))
        for index, method in enumerate(methods):
            own = [row for row in rows if row["method"] == method and name in row and row["name"] not in SEEDS]
            sizes = [row["denoiser_bytes"] / 1e6 for row in own]
            axes.plot(
                sizes, [row[name] for row in own], "osD^vPX*<>"[index % 10], markersize=7, label=method, alpha=0.8
            )
            for row, size in zip(own, sizes, strict=True):
                text = row["name"].removeprefix(f"{method}-")
                axes.annotate(text, (size, row[name]), textcoords="offset points", xytext=(6, 2), fontsize=6.5)
        if name in noise:
            axes.axhspan(*noise[name], color="0.9", zorder=0, label="float, other seeds: 95 %")
        axes.set_yscale("log")
        axes.set_xlabel("denoiser, MB (what is not quantized in 16 bits)")
        axes.set_title(f"{caption} (less is better)", loc="left", fontsize=10)
        axes.grid(True, color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)


def draw_rows(settings: Settings, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One picture of each label from the same seed, a column for each row."""
    from diffusion.judge import load_pictures
    from hf_lowbit.evaluation.pictures.figures import draw_grid

    columns = {}
    for row in rows:
        if "failed" not in row and row["name"] not in list(SEEDS)[1:]:
            try:
                columns[row["name"]] = load_pictures(settings, row["name"])
            except FileNotFoundError:  # a row of an earlier run, whose folder of pictures is gone
                continue
    draw_grid(columns, LABELS[: settings.images], path)
