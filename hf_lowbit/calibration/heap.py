"""Memory that is no longer needed, handed back to the system."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")  # Linux
_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4 and later, which Python's mmap does not name


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


def hand_back_pages(tensors: Iterable[Tensor]) -> None:
    """Give the system the pages of tensors in a mapped checkpoint, which stay valid: they are read again when needed.

    For values that are kept only to undo a step. Tensors elsewhere, and systems other than Linux, are left alone.
    """
    files = _mapped_files()
    for tensor in tensors:
        start, end = _range_of(tensor)
        if _is_within(files, start, end):
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # neighbours share the pages at both ends
            length = max(0, end // mmap.PAGESIZE * mmap.PAGESIZE - first)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _PAGEOUT)  # advice: it may fail


def alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is part of something larger that would stay with it: a mapped checkpoint."""
    is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if is_part or _is_within(_mapped_files(), *_range_of(tensor)) else tensor


def _range_of(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its storage; none of a tensor that is not in the host's memory."""
    if tensor.device.type != "cpu":
        return 0, 0
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from files."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [
        (int(start, 16), int(end, 16))
        for addresses, _, _, _, inode, *_ in fields
        if inode != "0"
        for start, end in [addresses.split("-")]
    ]


def _is_within(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    return start < end and any(first <= start and end <= last for first, last in ranges)
