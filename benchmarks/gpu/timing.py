"""How products are timed: replayed CUDA graphs that cycle through more weights than the cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

COLD_BYTES = 300 << 20  # several times the cache of an H200
ROUNDS = 5
MANY_TOKENS, FEW_WEIGHTS = 64, 4  # from there on arithmetic counts, and fewer weights are enough


def microseconds(call: Callable[[int], Any], count: int) -> float:
    """Median time of call(i), from graphs of ``count`` calls."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / count)
    return 1e3 * statistics.median(times)


def cold_count(size: int) -> int:
    """How many matrices of ``size`` bytes are more than the cache holds."""
    return max(FEW_WEIGHTS, COLD_BYTES // size)


def calls(weights: int, tokens: int) -> int:
    """Calls of one graph: with many tokens, a few are long enough."""
    return weights if tokens < MANY_TOKENS else min(weights, FEW_WEIGHTS)


def copy_bandwidth() -> float:
    """Bytes per microsecond that a kernel of torch on 1 GiB reads and writes."""
    source = torch.randint(2**31 - 1, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / microseconds(lambda _: torch.add(source, 1, out=target), 3)


def small_copy(size: int) -> float:
    """Microseconds of a copy that moves as many bytes in all, cold, its launch included."""
    count = size // 8
    source = torch.ones(max(COLD_BYTES // 4, count), dtype=torch.int32, device="cuda")
    target, places = torch.empty_like(source), source.numel() // count
    parts = [slice(count * i, count * (i + 1)) for i in range(places)]
    return microseconds(lambda i: torch.add(source[parts[i]], 1, out=target[parts[i]]), min(places, 40))
