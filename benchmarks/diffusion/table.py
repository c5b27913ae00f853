"""Rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = (  # key, heading, form, unit
    ("bits_per_weight", "bits/w", "{:6.3f}", 1.0),
    ("denoiser_bytes", "MB", "{:5.2f}", 1e-6),
    ("fid", "fid", "{:8.4f}", 1.0),
    ("fid_other", "other", "{:8.4f}", 1.0),
    ("fid_real", "real", "{:7.3f}", 1.0),
    ("kid", "kid", "{:9.2e}", 1.0),
    ("ssim", "ssim", "{:.4f}", 1.0),
    ("psnr", "psnr", "{:5.2f}", 1.0),
    ("map_distance", "maps", "{:.4f}", 1.0),
    ("agreement", "agree%", "{:5.1f}", 100.0),
    ("quantize_seconds", "quant s", "{:6.0f}", 1.0),
    ("seconds_per_picture", "ms/pic", "{:7.1f}", 1e3),
)


def table(rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Sequence[float]], heading: bool = True) -> str:
    """A line for each row; a star marks a fid within noise, a dot one of other seeds ("other") within noise."""
    lines = []
    if heading:
        for name, (low, high) in noise.items():
            lines.append(f"noise of {name}, float against float with other seeds: {low:.4g} to {high:.4g}")
        widths = [max(len(form.format(0.0)), len(title)) + 1 for _, title, form, _ in _COLUMNS]
        titles = (title.rjust(width) for (_, title, _, _), width in zip(_COLUMNS, widths, strict=True))
        lines.append(f"{'row':30s}" + " ".join(titles))
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['name']:30s} failed: {row['failed'][:150]}")
            continue
        cells = []
        for name, title, form, scale in _COLUMNS:
            width = max(len(form.format(0.0)), len(title))
            text = form.format(scale * row[name]) if name in row else ""
            mark = " "
            if name in ("fid", "fid_other") and name in row and noise:
                within = row[name] <= noise["fid"][1]
                mark = ("*" if name == "fid" else ".") if within else " "
            cells.append(text.rjust(width) + mark)
        lines.append(f"{row['name']:30s}" + " ".join(cells))
    return "\n".join(lines)
