"""Times of calls from Python, in turn."""

from __future__ import annotations

import statistics
import time

import torch

from scans.ways import Calls


def measure(calls: Calls, rounds: int, least: float = 0.02) -> dict[str, float]:
    """Microseconds of each way, and how many times as long transformers took in the same round."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    repeats = {}
    for way, call in calls.items():
        call(0)
        begun = time.perf_counter()
        call(0)
        _wait()
        repeats[way] = max(1, min(1000, int(least / (time.perf_counter() - begun))))
    for _ in range(rounds):
        for way, call in calls.items():
            begun = time.perf_counter()
            for _ in range(repeats[way]):
                call(0)
            _wait()
            times[way].append(1e6 * (time.perf_counter() - begun) / repeats[way])
    result = {f"{way}_us": statistics.median(values) for way, values in times.items()}
    for way in list(calls)[1:]:
        ratios = [float(a / b) for a, b in zip(times["transformers"], times[way], strict=True)]
        result[f"{way}_times_as_fast"] = statistics.median(ratios)
    return result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
