"""One picture: decode speed of SmolLM2 by variant, with sizes on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLOATS = ("float32", "bfloat16")
COLOURS = {"float": "#9aa5b1", "hf_lowbit": "#1f6fb4", "peer": "#d9a441"}


def owner(row: dict[str, Any], peers: set[str]) -> str:
    """Whose bar it is: a key of `COLOURS`."""
    if row["name"] in peers:
        return "peer"
    return "float" if row["name"] in FLOATS else "hf_lowbit"


def label(row: dict[str, Any]) -> str:
    """Beside the bar: speed, size on disk, and whether the run was a short one."""
    if "decode" not in row:
        return row.get("reason", "not measured")[:60]
    short = f", {row['new_tokens']:.0f} tokens only" if row["new_tokens"] < 64 else ""
    return f"{row['decode']:.3g}   {row['disk_mb']:.0f} MB{short}"


def draw(table: Sequence[dict[str, Any]], peers: set[str], machine: str, path: Path) -> None:
    """Horizontal bars, the fastest on top; rows without a number at the bottom, with their reason."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    bars = sorted((row for row in table if row["task"] == "smollm2"), key=lambda row: row.get("decode", -1.0))
    if not bars:
        return
    speeds = [row.get("decode", 0.0) for row in bars]
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(bars) + 1.5), layout="constrained")
    axes.barh([row["name"] for row in bars], speeds, color=[COLOURS[owner(row, peers)] for row in bars], height=0.7)
    for place, (row, speed) in enumerate(zip(bars, speeds, strict=True)):
        axes.text(speed + max(speeds) * 0.01, place, label(row), va="center", fontsize=9)
    axes.set_xlim(0, max(speeds) * 1.28)
    axes.set_xlabel("tokens per second, one sequence; beside it: size of the weights on disk")
    axes.set_title(f"SmolLM2-135M, decode on {machine}", fontsize=11, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    names = {"float": "torch", "hf_lowbit": "hf_lowbit, round to nearest", "peer": "peers"}
    axes.legend(handles=[Patch(color=COLOURS[key], label=name) for key, name in names.items()], loc="lower right")
    figure.savefig(path, dpi=150)
