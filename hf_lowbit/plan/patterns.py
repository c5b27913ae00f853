"""Names and regular expressions that select modules."""

from __future__ import annotations

import re
from collections.abc import Iterable


def matches(pattern: str, name: str) -> bool:
    """True when a dotted module name contains the pattern as whole segments, or matches it as a full regex.

    "lm_head", "layers.0" and "layers.0.mlp" are names; "layers.0" does not match "layers.01". ``.*\\.q_proj`` and
    ``model\\.layers\\.[0-3]\\..*`` are regular expressions.
    """
    return f".{pattern}." in f".{name}." or re.fullmatch(pattern, name) is not None


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that matches, or None."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise ValueError for a pattern that is not a string or not a valid regular expression."""
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"a module name or regular expression is expected, not {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None


def generalise(name: str) -> str:
    """A module name with its list indices replaced by ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def generalisations(name: str) -> list[str]:
    """Patterns that a name answers to, the widest first.

    All indices as ``*``, then all but the last ("blocks.*.to_out.0").
    """
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts))
    return [generalise(name), ".".join([generalise(".".join(parts[:last])), *parts[last:]]) if last else name]


def expand(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a generalised pattern stands for: ``*`` is one list index."""
    regex = re.compile(r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in pattern.split(".")))
    return [name for name in names if regex.fullmatch(name)]
