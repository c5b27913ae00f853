"""What a wrong name is answered with: the closest right one, or all there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(name: object, known: Iterable[str], label: str = "known") -> str:
    """``did you mean 'bits'?`` where a known name is close; otherwise ``known: bits, format``."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{label}: {', '.join(names)}"


def unknown(kind: str, name: object, known: Iterable[str], label: str = "known") -> str:
    """The message about a name that is none of ``known``: ``unknown metric 'k'; did you mean 'kl'?``."""
    return f"unknown {kind} {name!r}; {suggest(name, known, label)}"
