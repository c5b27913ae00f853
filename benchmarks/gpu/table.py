"""Results as lines and Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
WAYS = {"eager": "eager", "compiled": "compiled", "graph_1": "graph", "graph_16": "graph, 16 sequences"}
_PREFILLS = ("prefill_512", "prefill_2048")


def kernel_line(row: Row) -> str:
    """One product."""
    rows, columns = row["shape"]
    name = f"{rows}x{columns} {row['weight']:24} {row.get('tokens', ''):>4} tokens"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    text = f"{name}: {row['us']:7.1f} us, {row['bfloat16_us'] / row['us']:.2f}x bfloat16"
    if "copy_us" in row and row["tokens"] <= 16:
        text += f", {_shares(row)} of the bandwidth of large copies / of a copy as small"
    return f"{text} ({row['kernel']})"


def span(values: Iterable[float]) -> str:
    """The smallest and the largest, or both at once."""
    texts = sorted({f"{value:.1f}" for value in values}, key=float)
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def kernel_table(rows: Sequence[Row]) -> str:
    """Multiples of torch's bfloat16 product by number of tokens, over all shapes."""
    done = [row for row in rows if "us" in row]
    tokens = sorted({row["tokens"] for row in done})
    lines = [f"| weights | {' | '.join(map(str, tokens))} |", "|---" * (len(tokens) + 1) + "|"]
    for name in dict.fromkeys(row["weight"] for row in done):
        cells = []
        for count in tokens:
            own = [row for row in done if row["weight"] == name and row["tokens"] == count]
            cells.append(span(row["bfloat16_us"] / row["us"] for row in own) if own else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_table(rows: Sequence[Row]) -> str:
    """One token: the share of the bandwidth of large copies, and of that of a copy of as many bytes, by shape."""
    done = [row for row in rows if row.get("tokens") == 1 and "copy_us" in row]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in done))
    heads = [f"{rows} x {columns}" for rows, columns in shapes]
    lines = [f"| one token: of large copies / of a copy as small | {' | '.join(heads)} |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for name in dict.fromkeys(row["weight"] for row in done):
        own = {tuple(row["shape"]): row for row in done if row["weight"] == name}
        cells = [_shares(own[shape]) if shape in own else "" for shape in shapes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_table(rows: Sequence[Row]) -> str:
    """Tokens per second of whole models, with the share of the bound where one sequence is decoded; sizes."""
    heads = ["model", *WAYS.values(), *(name.replace("_", " ") for name in _PREFILLS), "GB", "packed in s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [_speed(row.get(way, {}), None if way == "graph_16" else row["bound"]) for way in WAYS]
        cells += [f"{row[name]:.0f}" for name in _PREFILLS]
        cells += [f"{row['memory_bytes'] / 1e9:.2f}", f"{row['pack_s']:.1f}" if "pack_s" in row else ""]
        lines.append(f"| {row['shape']} {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shares(row: Row) -> str:
    return f"{row['copy_us'] / row['us']:.0%} / {row['small_copy_us'] / row['us']:.0%}"


def _speed(result: Row, bound: float | None) -> str:
    """Tokens per second; of the GPU's time, where it is known, the share that reading the weights would take."""
    if "tokens_per_s" not in result:
        return str(result.get("failed", ""))
    share = "" if bound is None or "gpu_ms" not in result else f" ({1e3 / bound / result['gpu_ms']:.0%})"
    return f"{result['tokens_per_s']:.0f}{share}"
