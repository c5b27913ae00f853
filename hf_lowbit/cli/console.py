"""Terminal output: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PIPE_WIDTH = 120


def screen(stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; wide enough for a table where the output is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def say(message: str) -> None:
    """A line about the progress of the work, on stderr."""
    screen(stderr=True).print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """A warning, on stderr."""
    screen(stderr=True).print(f"[yellow]warning:[/yellow] {escape(' '.join(message.split()))}", soft_wrap=True)


def print_json(values: dict[str, Any]) -> None:
    """The one JSON object of a command, on stdout."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


@contextmanager
def work() -> Iterator[list[str]]:
    """Around a command's work: libraries print to stderr, hf_lowbit's warnings and progress are shown as ours.

    Yields:
        The warnings shown so far.
    """
    handler = _Handler()
    logger = logging.getLogger("hf_lowbit")
    propagate, logger.propagate = logger.propagate, False
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with redirect_stdout(sys.stderr):
            yield handler.shown
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


def facts(rows: list[tuple[str, str]]) -> None:
    """Labels and values in two columns, on stdout; in a terminal long values wrap in their column."""
    if not sys.stdout.isatty():
        width = max((len(label) for label, _ in rows), default=0)
        for label, value in rows:
            print(f"  {label:{width}}  {value}")
        return
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(f"  {escape(label)}", escape(value))
    screen().print(table)


def size(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}" if count < 100 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"


def group_name(group_size: int | str | None) -> str:
    """Granularity in words."""
    if isinstance(group_size, int):
        return f"groups of {group_size}"
    return "one scale per row" if group_size is None else f"one scale per {group_size}"


class _Handler(logging.Handler):
    """Shows each warning once, and the engine's account of its progress; not what single modules have to say."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.shown: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno < logging.WARNING:
            if record.name == "hf_lowbit":
                say(message)
        elif message not in self.shown:
            self.shown.append(message)
            warn(message)
