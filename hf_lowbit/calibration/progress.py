"""How far the walk is, and how long it will take."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger("hf_lowbit")


class Progress:
    """Logs each finished block, or what else is counted, with the time that is left: the mean of those computed so far
    for each."""

    def __init__(self, total: int, what: str = "block") -> None:
        self.total, self.done, self._computed, self._what = total, 0, 0, what
        self._started = self._last = time.monotonic()

    def step(self, name: str, restored: bool) -> None:
        """One more block is finished."""
        now = time.monotonic()
        self.done += 1
        self._computed += not restored
        if restored:
            self._started += now - self._last  # taken over, not computed: it says nothing of the rest
            logger.info("%s %d of %d: %s taken from the earlier run", self._what, self.done, self.total, name)
        else:
            left = (now - self._started) / self._computed * (self.total - self.done)
            logger.info(
                "%s %d of %d: %s in %.1f s, %s left",
                self._what, self.done, self.total, name, now - self._last, duration(left),
            )  # fmt: skip
        self._last = now


def duration(seconds: float) -> str:
    """ "2 h 05 min", "3 min 20 s", "12 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
