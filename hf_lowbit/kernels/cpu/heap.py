"""Memory of freed tensors, kept for the next ones."""

from __future__ import annotations

import torch

_BLOCK = 16 << 20  # bytes


def keep_freed_memory() -> None:
    """Let the C library keep up to 32 MB of freed memory at the end of its heap, and blocks of up to 16 MB in it.

    glibc begins with 128 kB, and goes on with as much as the largest block that a process has freed so far. A float
    model's weights and its products' buffers are such blocks. Packed weights are small: the layers of a prompt of 512
    tokens then get every result in new pages, which the system has to clear first. Whoever sets
    ``MALLOC_MMAP_THRESHOLD_`` or ``MALLOC_TRIM_THRESHOLD_`` has decided this before: then nothing changes, nor does it
    with other C libraries.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)  # freed at once; none of its pages is ever touched
