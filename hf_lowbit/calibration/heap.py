"""Memory that is no longer needed, handed back to the system."""

from __future__ import annotations

import ctypes

from torch import Tensor


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


def alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is part of something larger that would stay with it: a mapped checkpoint."""
    whole = tensor.untyped_storage().nbytes()
    return tensor.clone() if whole > tensor.numel() * tensor.element_size() else tensor
