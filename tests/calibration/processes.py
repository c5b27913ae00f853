"""Two processes of one data-parallel run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[Path, str], None]


def run_in_two(work: Work, folder: Path) -> None:
    """``work(folder, "rank0")`` and ``work(folder, "rank1")``, joined by gloo. ``work`` is a function of a module."""
    mp.spawn(_join, (work, folder), nprocs=2)


def _join(rank: int, work: Work, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        work(folder, f"rank{rank}")
    finally:
        dist.destroy_process_group()
