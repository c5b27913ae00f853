"""Speed of the scan and the convolution, against transformers' functions of the same in Python.

    python benchmarks/scan.py [--threads 2] [--tokens 512] [--rounds 7] [--models mamba-130m,...] [--output FILE]
    python benchmarks/scan.py --device cuda --tokens 512,2048 --output benchmarks/results/scan_h200.json

One layer of each size, batch 1: a prompt, and one decoded token with its states changed in place. "float32",
"bfloat16" (on a GPU) and "int8" (codes in, float32 out of the scan, codes out of the convolution, int8 states) are
hf_lowbit's kernels, "reference" its torch code. transformers gets its own layout, in float32. All are measured in turn
in every round; medians, and medians of transformers' time as a multiple in the same round.

On a GPU those times are of calls from Python. Beside them stands what the GPU alone takes, of replayed CUDA graphs
("_graph_us"): of one token the launch is far more than the work. transformers' prompts have none: its Mamba loops over
the tokens. One token's scans go through more copies of the state and A than the cache holds; "bound_us" is what moving
these takes at the bandwidth of a large copy in the same run, "copy_us" what a copy of as many bytes takes.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from gpu.timing import COLD_BYTES, copy_bandwidth, microseconds, small_copy
from scans.timing import measure
from scans.ways import MODELS, Calls, convolutions, scan_bytes, scans

from hf_lowbit.kernels import cpu

MOST_COPIES, GRAPH_CALLS = 1024, 16  # of states; in a graph, of a prompt


def on_gpu(calls: Calls, tokens: int, copies: int) -> dict[str, float]:
    """Microseconds of each way without the host's part."""
    ways = [way for way in calls if tokens == 1 or way != "transformers"]
    count = copies if copies > 1 else GRAPH_CALLS
    return {f"{way}_graph_us": microseconds(lambda i, way=way: calls[way](i % copies), count) for way in ways}


def bounds(name: str, bandwidth: float) -> dict[str, float]:
    """What one token's bytes take at least, of float32 and of int8 states."""
    result: dict[str, float] = {}
    for way, size in (("float32", 4), ("int8", 1)):
        moved = scan_bytes(name, size)
        result[f"{way}_bound_us"] = moved / bandwidth
        result[f"{way}_copy_us"] = small_copy(moved)
    return result


@torch.no_grad()
def row(name: str, tokens: int, what: str, bandwidth: float | None, rounds: int) -> dict[str, Any]:
    """All times of one layer's scan or convolution."""
    copies = 1
    if bandwidth is not None and tokens == 1 and what == "scan":
        copies = min(MOST_COPIES, COLD_BYTES // scan_bytes(name, 1))
    calls = scans(name, tokens, copies) if what == "scan" else convolutions(name, tokens)
    result: dict[str, Any] = {"model": name, "tokens": tokens, "what": what, **measure(calls, rounds)}
    if bandwidth is not None:
        result |= on_gpu(calls, tokens, copies)
        if copies > 1:
            result |= {"copies": copies, **bounds(name, bandwidth)}
    return result


def line(values: dict[str, Any]) -> str:
    """One row for reading."""
    ways = [key.removesuffix("_times_as_fast") for key in values if key.endswith("_times_as_fast")]
    each = [f"{way} {values[f'{way}_us']:.0f} us" for way in ("transformers", *ways)]
    fast = [f"{values[f'{way}_times_as_fast']:.1f}x" for way in ways]
    text = (
        f"{values['model']:12} {values['tokens']:4} tokens, {values['what']:11}: {', '.join(each)}; {' / '.join(fast)}"
    )
    more = [f"{key} {value:.1f}" for key, value in values.items() if key.endswith(("graph_us", "bound_us", "copy_us"))]
    return f"{text}\n    {', '.join(more)}" if more else text


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="512", help="of the prompts, separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    results: dict[str, Any] = {"torch": torch.__version__, "rows": []}
    bandwidth = None
    if arguments.device == "cuda":
        bandwidth = copy_bandwidth()  # bytes per microsecond
        results |= {"gpu": torch.cuda.get_device_name(), "copy_terabytes_per_second": bandwidth / 1e6}
        print(f"{results['gpu']}, copies {bandwidth / 1e6:.2f} TB/s", flush=True)
    else:
        machine = platform.processor() or platform.machine()
        results |= {"machine": machine, "instruction_set": cpu.instruction_set(), "threads": arguments.threads}
    for name in arguments.models.split(","):
        for tokens in (1, *map(int, arguments.tokens.split(","))):
            for what in ("scan", "convolution"):
                results["rows"].append(row(name, tokens, what, bandwidth, arguments.rounds))
                print(line(results["rows"][-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
