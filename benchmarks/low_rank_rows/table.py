"""Rows as text: by size, each with what it recovers of what its plain method lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from low_rank_rows.rows import GROUP


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The smallest first; "recovered" is 1 - KL / KL of the same method and bits in groups of 64 alone."""
    plain = {(row["method"], row["bits"]): row["kl"] for row in rows if row["name"].endswith(f"-g{GROUP}")}
    lines = [f"{'row':34s} bits/weight  KL [95 %]                  perplexity  recovered"]
    for row in sorted(rows, key=lambda row: (row["method"], row["bits_per_weight"], row["kl"])):
        low, high = row["intervals"]["kl"]
        base = plain.get((row["method"], row["bits"]))
        recovered = "" if base is None or base == row["kl"] else f"{1 - row['kl'] / base:9.1%}"
        lines.append(
            f"{row['name']:34s} {row['bits_per_weight']:11.3f}  {row['kl']:.4f} [{low:.4f}, {high:.4f}] "
            f"{row['perplexity']:14.2f} {recovered}"
        )
    return "\n".join(lines)
