"""The relative errors of a report, grouped by kind of layer: q_proj of every block, down_proj of every block, ..."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hf_lowbit.reporting import Report

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_MOST_PANELS = 24


@dataclass
class Panel:
    """The layers of one kind.

    Attributes:
        kind: their common name, "self_attn.q_proj"; with "*" for numbers where a name has several.
        places: number of each one's block, or its place among its kind where names have no or several numbers.
        errors: ||W - Q|| / ||W|| of each.
    """

    kind: str
    places: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def panels_of(report: Report) -> list[Panel]:
    """Panels in the order of the model. Layers whose error nobody measured, and tied ones, are left out.

    Kinds are names with their numbers left out. Where that makes too many to look at (a UNet's blocks differ), they are
    the last parts of names.
    """
    measured = {layer.name.removesuffix(".weight"): layer.error for layer in report.layers if layer.error is not None}
    panels: dict[str, Panel] = {}
    for name, kind in _kinds(list(measured)).items():
        panel = panels.setdefault(kind, Panel(kind))
        numbers = _NUMBER.findall(name)
        panel.places.append(int(numbers[0]) if len(numbers) == 1 else -1)
        panel.errors.append(measured[name])
    for panel in panels.values():
        if min(panel.places) < 0 or len(set(panel.places)) < len(panel.places):
            panel.places = list(range(len(panel.errors)))
    return list(panels.values())


def _kinds(names: list[str]) -> dict[str, str]:
    """Name -> kind."""
    patterns = {name: _NUMBER.sub("*", name) for name in names}
    distinct = set(patterns.values())
    if len(distinct) > _MOST_PANELS:
        return {name: name.rpartition(".")[2] for name in names}
    short = {pattern: pattern.rpartition("*.")[2] for pattern in distinct}
    if len(set(short.values())) < len(distinct):  # "fc1" of an encoder and of a decoder are two kinds
        return patterns
    return {name: short[pattern] for name, pattern in patterns.items()}
