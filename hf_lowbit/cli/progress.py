"""Progress bars: the libraries' own and ours, drawn in one style and only where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_lowbit.cli.console import screen

if TYPE_CHECKING:
    from torch import nn

_LOADING = "Loading weights"  # how transformers calls its bar


@contextmanager
def progress(description: str) -> Iterator[None]:
    """Show transformers' bars while it loads or writes a model; the one of loading is named ``description``."""
    from transformers.utils import logging as library

    enabled = library.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        library.disable_progress_bar()
    with _bars("tensors") as bars:
        previous = library.set_tqdm_hook(lambda factory, args, kwargs: _Bar(bars, description, *args, **kwargs))
        try:
            yield
        finally:
            library.set_tqdm_hook(previous)
            if enabled:
                library.enable_progress_bar()


@contextmanager
def windows(model: nn.Module, description: str, total: int | None = None) -> Iterator[None]:
    """Count the forward passes of ``model``."""
    with _bars("windows") as bars:
        task = bars.add_task(description, total=total)
        hook = model.register_forward_hook(lambda *_: bars.advance(task))
        try:
            yield
        finally:
            hook.remove()


def _bars(unit: str) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=screen(stderr=True), transient=True, disable=not sys.stderr.isatty())


class _Bar:
    """What transformers uses of a tqdm bar, drawn by rich."""

    def __init__(self, bars: Progress, description: str, iterable: Any = None, *_: Any, **options: Any) -> None:
        self.bars, self.iterable = bars, iterable
        total = options.get("total")
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        for earlier in bars.tasks:  # transformers does not close all of its bars
            bars.remove_task(earlier.id)
        own = str(options.get("desc") or description)
        self.task = bars.add_task(description if own == _LOADING else own.lower(), total=total)

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self, count: float = 1) -> None:
        """Count."""
        if self.task in self.bars.task_ids:
            self.bars.advance(self.task, count)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        """It stays until the next one."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None
