"""The parts of a model card that are lists: formats, skipped modules, measured numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from hf_lowbit.plan.patterns import generalise
from hf_lowbit.reporting import LayerReport

_SHOWN = 12
# An absolute path of some machine; what follows "://" or another path segment is none.
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/\\.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"=]+[/\\])+([^\s/\\'\"=]*)")
_NOT_CONDITIONS = ("command", "intervals")


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last part."""
    return _ABSOLUTE_PATH.sub(lambda found: found[1] or "folder", text)


def formats(layers: list[LayerReport]) -> str:
    """A table with a row for each distinct packing."""
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        key = (layer.format, layer.bits, layer.group_size, layer.symmetric, layer.activation, layer.low_rank)
        groups.setdefault(key, []).append(layer)
    rows = ["| parameters | format | scales | inputs | bytes | error |", "|---|---|---|---|---|---|"]
    for (name, bits, group, symmetric, activation, rank), members in groups.items():
        kind = f"{name}, {bits} bits{'' if symmetric else ', asymmetric'}{f', low rank {rank}' if rank else ''}"
        granularity = {None: "per row", "tensor": "per tensor"}.get(group, f"groups of {group}")
        inputs = "full precision" if activation is None else activation
        inputs += ", simulated" if members[0].arithmetic == "simulated" else ""
        names, size = _names(layer.name for layer in members), f"{sum(layer.packed_bytes for layer in members):,}"
        rows.append(f"| {names} | {kind} | {granularity} | {inputs} | {size} | {_error(members)} |")
    return "\n".join(rows)


def skipped(reasons: dict[str, str]) -> str:
    """A table of modules by reason, or a sentence."""
    if not reasons:
        return "No module that could have been packed."
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    rows = ["| modules | why |", "|---|---|"]
    rows += [f"| {_names(names)} | {_cell(reason)} |" for reason, names in by_reason.items()]
    return "\n".join(rows)


def evaluation(values: dict[str, Any]) -> str:
    """A table of measured numbers, each with the command that measured it; "Not measured." without any."""
    found = list(_measurements(values, "", ""))
    if not found:
        return "Not measured."
    rows = ["| number | value | 95 % interval | conditions | command |", "|---|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in found]
    return "\n".join(rows)


def _measurements(values: dict[str, Any], section: str, command: str) -> Iterator[tuple[str, ...]]:
    """Floats are measurements; whole numbers, words and flags say under which conditions; dicts are sections."""
    command = f"`{_cell(values['command'])}`" if values.get("command") else command
    intervals = values.get("intervals") or {}
    conditions = ", ".join(
        f"{name} {_cell(value)}"
        for name, value in values.items()
        if isinstance(value, bool | int | str) and name not in _NOT_CONDITIONS
    )
    for name, value in values.items():
        label = f"{section} {name}".strip()
        if isinstance(value, float):
            interval = intervals.get(name)
            bounds = "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
            yield _cell(label), f"{value:.4g}", bounds, conditions, command or "not recorded"
        elif isinstance(value, dict) and name not in _NOT_CONDITIONS:
            yield from _measurements(value, label, command)


def _error(layers: list[LayerReport]) -> str:
    errors = [layer.error for layer in layers if layer.error is not None]
    return f"{sum(errors) / len(errors):.4f}, at most {max(errors):.4f}" if errors else "not known"


def _names(names: Iterable[str]) -> str:
    patterns = [f"`{pattern}`" for pattern in dict.fromkeys(map(generalise, names))]
    more = f" and {len(patterns) - _SHOWN} more" if len(patterns) > _SHOWN else ""
    return ", ".join(patterns[:_SHOWN]) + more


def _cell(value: Any) -> str:
    return without_paths(" ".join(str(value).split())).replace("|", "\\|")
