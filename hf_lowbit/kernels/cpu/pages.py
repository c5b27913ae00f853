"""Weights in large pages of memory: with small ones, to find where each lies takes up to a fifth of reading it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

_LINE = 64  # bytes of the processor's caches
_WANTED = ("MADV_HUGEPAGE", "MAP_PRIVATE", "MAP_ANONYMOUS")


def gather_in_large_pages(tensors: Iterable[Tensor]) -> int:
    """Move what CPU tensors hold side by side into large pages; their order is that in which they are read.

    The tensors stay the same objects, each with a storage of its own. What shares memory shares it afterwards.

    Args:
        tensors: contiguous.

    Returns:
        How many bytes were moved; 0 where the system has no large pages, or none are asked for.
    """
    if not all(hasattr(mmap, name) for name in _WANTED):
        return 0
    given = [tensor for tensor in tensors if tensor.nbytes]
    identities = [(tensor.data_ptr(), tensor.nbytes) for tensor in given]
    places: dict[tuple[int, int], int] = {}
    end = 0
    for identity in identities:
        if identity not in places:
            places[identity] = end
            end += -(-identity[1] // _LINE) * _LINE
    if not end:
        return 0
    memory = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a system without them
        return 0
    moved: dict[int, Tensor] = {}
    for tensor, identity in zip(given, identities, strict=True):
        place = places[identity]
        if place not in moved:
            moved[place] = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=place)
            moved[place].copy_(tensor.detach().reshape(-1))
        tensor.data = moved[place].view(tensor.shape)
    return end
