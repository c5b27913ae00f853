"""Functions that compiled graphs leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_graphs(function: _Function) -> _Function:
    """What torch.compiler.disable marks a function with; that itself would load the compiler on import."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
