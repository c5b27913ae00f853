"""How busy everything else on the machine is: what makes a number doubtful."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path


class Usage:
    """Processor time since its creation, of all and of this process' children. Linux only."""

    def __init__(self) -> None:
        self.begun, self.all, self.children = time.perf_counter(), _all_seconds(), _children_seconds()

    def of_others(self) -> float:
        """Cores that others kept busy on average, time stolen from a virtual machine included."""
        busy = _all_seconds() - self.all - (_children_seconds() - self.children)
        return max(0.0, busy) / (time.perf_counter() - self.begun)


def others_cores(seconds: float = 5.0) -> float:
    """Cores busy while this process waits."""
    usage = Usage()
    time.sleep(seconds)
    return usage.of_others()


def _all_seconds() -> float:
    """user, nice, system, irq, softirq and steal; idle and waiting are left out."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
