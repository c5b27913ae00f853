"""Rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_QUALITY = (  # path, heading, form, scale
    ("bits_per_weight", "bits/w", "{:.2f}", 1.0),
    ("checkpoint_bytes", "MB", "{:.2f}", 1e-6),
    ("state_bytes", "state kB", "{:.1f}", 1e-3),
    ("perplexity", "ppl", "{:.3f}", 1.0),
    ("perplexity_ratio", "ratio", "{:.4f}", 1.0),
    ("kl", "KL", "{:.5f}", 1.0),
    ("top1_agreement", "top1%", "{:.2f}", 100.0),
    ("decode.perplexity_ratio", "decoded", "{:.4f}", 1.0),
    ("decode.kl", "KL", "{:.5f}", 1.0),
    ("load_seconds", "load s", "{:.1f}", 1.0),
    ("seconds", "eval s", "{:.1f}", 1.0),
    ("decode.seconds", "dec s", "{:.1f}", 1.0),
)
_SPEED = (
    ("prefill_ms", "prefill ms", "{:.1f}", 1.0),
    ("prefill_speedup", "x float", "{:.2f}", 1.0),
    ("decode_ms", "decode ms", "{:.2f}", 1.0),
    ("decode_speedup", "x float", "{:.2f}", 1.0),
)
_WIDTH = 10


def quality_table(rows: Sequence[Mapping[str, Any]], heading: bool = True) -> str:
    """A line for each row."""
    return _table(rows, _QUALITY, heading)


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row."""
    return _table(rows, _SPEED, True)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str, float]], heading: bool) -> str:
    lines = ["row".ljust(30) + "".join(title.rjust(_WIDTH) for _, title, _, _ in columns)] if heading else []
    for row in rows:
        cells = ""
        for path, _, form, scale in columns:
            value: Any = row
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            cells += ("" if value is None else form.format(scale * value)).rjust(_WIDTH)
        reason = f"  {row.get('stage', '')} failed: {row['failed']}" if "failed" in row else ""
        lines.append(row["name"].ljust(30) + cells.rstrip() + reason[:160])
    return "\n".join(lines)
