"""The host's memory, watched."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch


class Peak:
    """The largest resident memory of this process, sampled; page-locked memory, which is not in it, apart."""

    def __enter__(self) -> Peak:
        self.largest, self.pinned, self._stop = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._stop.wait(0.05):
            self.largest = max(self.largest, int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        stats = torch.cuda.host_memory_stats()
        self.pinned = max([stats.get(f"{kind}_bytes.peak", 0) for kind in ("allocated", "active", "reserved")])
