"""Accounts of saved models, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from hf_lowbit.cli.console import facts, group_name, screen, size, warn

if TYPE_CHECKING:
    from hf_lowbit.cli.account import Account

_MOST_REASONS = 12


def account_json(folder: Path, accounts: dict[str, Account]) -> dict[str, Any]:
    """One object: the account of a model, or totals and all components of a pipeline."""
    if list(accounts) == [""]:
        return {"folder": str(folder), **accounts[""].to_dict()}
    parts = {name: account.to_dict() for name, account in accounts.items()}
    packed, elements = (sum(part[key] for part in parts.values()) for key in ("packed_bytes", "elements"))
    return {
        "folder": str(folder),
        "bits_per_weight": 8 * packed / elements if elements else 0.0,
        "packed_bytes": packed,
        "elements": elements,
        "other_bytes": sum(part["other_bytes"] for part in parts.values()),
        "tensor_bytes": sum(part["tensor_bytes"] for part in parts.values()),
        "layers": [{**layer, "component": name} for name, part in parts.items() for layer in part["layers"]],
        "skipped": {f"{name}.{key}": why for name, part in parts.items() for key, why in part["skipped"].items()},
        "warnings": [f"{name}: {text}" for name, part in parts.items() for text in part["warnings"]],
        "components": parts,
    }


def show_account(accounts: dict[str, Account], shown_warnings: list[str], layers: bool = False) -> None:
    """Totals, warnings and what was left out of each model; with ``layers`` a table of every layer."""
    for name, account in accounts.items():
        if name:
            screen().print(f"[bold]{escape(name)}[/bold]")
        facts(_totals(account))
        _show_quality(account.report.evaluation)
        if layers:
            screen().print(_layer_table(account.report.layers))
        _show_skipped(account.report.skipped)
        for warning in account.report.warnings:
            if warning not in shown_warnings:
                warn(warning)


def _totals(account: Account) -> list[tuple[str, str]]:
    report, config = account.report, account.config
    group = group_name(config.group_size)
    packed = [layer for layer in report.layers if layer.elements]
    before = f", {report.original_bits} before" if report.original_bits else ""
    rows = [
        ("method", f"{report.method}: {config.format}, {config.bits} bits, {group}"),
        ("quantized", f"{len(packed)} layers with {report.elements / 1e6:.1f} million weights"),
        ("stored for them", f"{size(report.packed_bytes)}, {report.bits_per_weight:.2f} bits per weight{before}"),
        ("left as it was", f"{size(report.other_bytes)} in other tensors"),
    ]
    if inputs := _inputs(packed):
        rows.append(("inputs rounded to", inputs))
    errors = [layer.error for layer in packed if layer.error is not None]
    if errors:
        mean = sum(errors) / len(errors)
        rows.append(
            (
                "rounding error",
                f"{100 * mean:.2f} % of the weights' norm, mean over layers (worst {100 * max(errors):.2f} %)",
            )
        )
    if report.seconds is not None:
        rows.append(("time to quantize", f"{report.seconds:.1f} s"))
    if report.peak_memory_bytes is not None:
        rows.append(("peak memory", f"{size(report.peak_memory_bytes)}, the whole process while quantizing"))
    rows.append(("counted from", str(account.to_dict()["counted_from"])))
    return rows


def _inputs(layers: list[Any]) -> str:
    """How many layers quantize their inputs to what, and how they multiply."""
    kinds = Counter((layer.activation, layer.arithmetic) for layer in layers if layer.activation is not None)
    return "; ".join(f"{form}, {arithmetic} products ({n})" for (form, arithmetic), n in kinds.most_common())


def _show_quality(evaluation: dict[str, Any]) -> None:
    from hf_lowbit.cli.quality import quality_rows

    rows = quality_rows(evaluation)
    if rows:
        facts(rows)


def _show_skipped(skipped: dict[str, str]) -> None:
    if not skipped:
        return
    from hf_lowbit.plan.patterns import generalise

    reasons: dict[str, list[str]] = {}
    for name, why in skipped.items():
        reasons.setdefault(why, []).append(name)
    screen().print(f"\nleft in full precision: {len(skipped)} module{'s' if len(skipped) > 1 else ''}")
    rows = []
    for why, names in list(reasons.items())[:_MOST_REASONS]:
        patterns = list(dict.fromkeys(generalise(name) for name in names))
        more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        rows.append((f"{', '.join(patterns[:3])}{more}", why))
    facts(rows)
    if len(reasons) > _MOST_REASONS:
        screen().print(f"  and {len(reasons) - _MOST_REASONS} more reasons (--json has all)")


def _layer_table(layers: list[Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("format")
    for column in ("weights", "stored", "bits per weight", "error, % of norm"):
        table.add_column(column, justify="right")
    for layer in layers:
        form = f"{layer.format} {layer.bits} bits, {group_name(layer.group_size)}"
        form += "" if layer.activation is None else f"; inputs {layer.activation}"
        if layer.tied_to:
            table.add_row(escape(layer.name), f"shares {escape(layer.tied_to)}", "", "", "", "")
            continue
        error = "" if layer.error is None else f"{100 * layer.error:.2f}"
        stored = (f"{layer.elements:,}", size(layer.packed_bytes), f"{layer.bits_per_weight:.2f}", error)
        table.add_row(escape(layer.name), form, *stored)
    return table
