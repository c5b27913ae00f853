"""An empty figure of matplotlib, which the extra ``eval`` brings; no window belongs to it."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """In inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots are drawn by matplotlib: pip install "hf_lowbit[eval]"') from None
    return Figure(figsize=(width, height), layout="constrained")
