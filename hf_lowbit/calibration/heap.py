"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes


def hand_back_memory() -> None:
    """Give the system the pages that the C library keeps for later, after a step that freed many tensors.

    glibc gives back what is freed at the end of its heap, and keeps the holes before it: after a model's tensors were
    replaced one by one, holes as large as the model. Where the C library is another one nothing happens.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
