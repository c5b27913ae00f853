"""Overrides that select exactly the layers that they are meant for, in few patterns."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from hf_lowbit.plan.patterns import matches

Template = tuple[str, str]  # a name around its first index
_INDEX = re.compile(r"(.*?(?:^|\.))(\d+)((?:\.|$).*)")


def select_exactly(chosen: Mapping[str, dict[str, Any]], names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Overrides (pattern -> fields) that give every layer its own fields and match no other.

    Layers with equal fields whose names differ in their first index only share a pattern, such as
    ``model\\.layers\\.(?:0|3)\\.mlp\\.up_proj``: a config of one pattern per layer would be long, and slow to match.

    Args:
        chosen: layer -> its fields.
        names: of all layers, those to be left alone included.
    """
    whole: dict[Template, set[str]] = {}
    for name in names:
        if found := _INDEX.fullmatch(name):
            whole.setdefault((found[1], found[3]), set()).add(name)
    shared: dict[tuple[Template, str], list[str]] = {}
    overrides: dict[str, dict[str, Any]] = {}
    for name, fields in chosen.items():
        if found := _INDEX.fullmatch(name):
            shared.setdefault(((found[1], found[3]), repr(sorted(fields.items()))), []).append(name)
        else:
            overrides[_literal(name, names)] = fields
    for ((before, after), _), members in shared.items():
        if len(members) == 1:
            pattern = _literal(members[0], names)
        elif set(members) == whole[before, after]:
            pattern = rf"{re.escape(before)}\d+{re.escape(after)}"
        else:
            indices = "|".join(name[len(before) : len(name) - len(after)] for name in members)
            pattern = f"{re.escape(before)}(?:{indices}){re.escape(after)}"
        overrides[pattern] = chosen[members[0]]
    return overrides


def _literal(name: str, names: Collection[str]) -> str:
    """The name itself where it selects that layer alone, else a regular expression that does."""
    if any(matches(name, other) for other in names if other != name):
        return f"(?:{re.escape(name)})"
    return name
