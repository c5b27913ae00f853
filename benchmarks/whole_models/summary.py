"""Medians over the rounds, and what they are relative to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from whole_models.variants import Variant

Results = dict[tuple[str, str], list[dict[str, Any]]]
QUIET_CORES = 0.25  # others' load that a round may have
BASELINES = {"openvino": "idle openvino", "llama_cpp": "idle llama_cpp"}
SPEEDS = {"smollm2": "decode", "llama1b": "decode", "whisper": "real_time_factor", "diffusion": "picture_s"}
COLUMNS = {
    "smollm2": (
        "decode",
        "ratio",
        "prefill",
        "load_s",
        "disk_mb",
        "footprint_mb",
        "decoded_peak_mb",
        "compile_s",
        "others_cores",
        "rounds_used",
    ),
    "whisper": (
        "real_time_factor",
        "ratio",
        "transcription_s",
        "text_tokens",
        "load_s",
        "disk_mb",
        "others_cores",
        "rounds_used",
    ),
    "diffusion": ("picture_s", "ratio", "load_s", "disk_mb", "denoiser_disk_mb", "others_cores", "rounds_used"),
    "llama1b": (
        "decode",
        "ratio",
        "read_gb_s",
        "weight_mb_per_token",
        "bound",
        "of_bound",
        "load_s",
        "disk_mb",
        "others_cores",
        "rounds_used",
    ),
}


def quiet(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of the last round's build in which others left the cores alone; all of it, where there is none."""
    same = [r for r in rounds if r.get("native_library") == rounds[-1].get("native_library")]
    return [r for r in same if r["others_cores"] <= QUIET_CORES] or same


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per quantity, over the quiet rounds; compilation is of the first round, later ones find it cached."""
    used = quiet(rounds)
    numbers = [name for name, value in used[0].items() if isinstance(value, int | float)]
    values = {name: statistics.median(r[name] for r in used) for name in numbers}
    if "compile_s" in values:
        values["compile_s"] = rounds[0]["compile_s"]
    return values


def rows(chosen: Sequence[Variant], results: Results, reasons: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """One per variant, in order: medians, rounds, ratio to float32 (above 1: faster), or the reason of its absence.

    ``footprint_mb`` is the peak once the model is loaded and has decoded, less that of a process which only imports.
    """
    table = []
    for variant in chosen:
        key = (variant.task, variant.name)
        row: dict[str, Any] = {"task": variant.task, "name": variant.name, "note": variant.note}
        if variant.new_tokens != 64 and variant.task == "smollm2":
            row["note"] = "; ".join(filter(None, (variant.note, f"only {variant.new_tokens} new tokens")))
        if results.get(key):
            row.update(medians(results[key]))
            row["rounds"] = results[key]
            row["rounds_used"] = len(quiet(results[key]))
            first = _of(results, variant.task, _reference(variant))
            quantity = SPEEDS[variant.task]
            if first and quantity in row:
                ratio = row[quantity] / first[quantity]
                row["ratio"] = ratio if quantity == "decode" else 1 / ratio
            idle = _of(results, "smollm2", BASELINES.get(variant.environment, "idle"))
            if idle and "decoded_peak_mb" in row:
                row["footprint_mb"] = row["decoded_peak_mb"] - idle["imported_peak_mb"]
        if key in reasons:
            row["reason"] = reasons[key]
        table.append(row)
    return table


def _reference(variant: Variant) -> str:
    return f"{variant.model} float32" if variant.task == "diffusion" else "float32"


def _of(results: Results, task: str, name: str) -> dict[str, float]:
    rounds = results.get((task, name))
    return medians(rounds) if rounds else {}


def text(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table per task."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in table):
        columns = COLUMNS[task]
        lines += ["", f"| {task} | {' | '.join(columns)} | note |", "|---" * (len(columns) + 2) + "|"]
        for row in (row for row in table if row["task"] == task):
            cells = [f"{row[name]:.4g}" if name in row else "" for name in columns]
            remark = "; ".join(filter(None, (row["note"], row.get("reason", ""))))
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {remark} |")
    return "\n".join(lines).strip()
