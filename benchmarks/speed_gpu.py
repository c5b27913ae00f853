"""Speed on an NVIDIA GPU: packed products against bandwidth, torch's bfloat16 product and peers, all in one run.

    python -m benchmarks.speed_gpu [--output speed_gpu.json] [--bits 2 3 4 8] [--groups 64 128 0] [--quick]

Copy bandwidth is that of a kernel of torch on 1 GiB, read and written. "copy" is what moving a matrix's bytes at it
would take, "small copy" what a copy of as many bytes takes, its launch included. Times are medians, of replayed CUDA
graphs that cycle through more weights than the cache holds. Peers are measured where they are installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec
from hf_lowbit.kernels import kernel_of, packed_linear

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096))  # of an 8B model; the last: gate and up together
TOKENS = (1, 4, 16, 64, 2048)
COLD_BYTES = 300 << 20


def microseconds(call: Callable[[int], Any], count: int, rounds: int = 5) -> float:
    """Median time of call(i), from graphs of ``count`` calls."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    graph.replay()
    times = []
    for _ in range(rounds):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / count)
    return 1e3 * statistics.median(times)


def random_packed(rows: int, columns: int, spec: WeightSpec) -> PackedTensor:
    """Random codes: only where they lie matters."""
    stored = spec.companions((rows,), columns)
    parts = {
        name: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        for name, (shape, dtype) in stored.items()
        if dtype == torch.int32
    }
    scale = (0.01 * torch.rand(stored["_scale"][0], device="cuda") + 0.001).bfloat16().view(torch.int16)
    return PackedTensor(parts[""], scale, spec, columns, parts.get("_zero_point"))


def copy_bandwidth() -> float:
    """Bytes per microsecond, read and written."""
    source = torch.randint(2**31 - 1, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / microseconds(lambda _: torch.add(source, 1, out=target), 3)


def small_copy(size: int) -> float:
    """Microseconds of a copy that moves as many bytes in all, cold."""
    count = size // 8
    source = torch.ones(max(COLD_BYTES // 4, count), dtype=torch.int32, device="cuda")
    target, places = torch.empty_like(source), source.numel() // count
    parts = [slice(count * i, count * (i + 1)) for i in range(places)]
    return microseconds(lambda i: torch.add(source[parts[i]], 1, out=target[parts[i]]), min(places, 40))


def peers(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Four bits in groups of 64 or 128 by what is installed."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        layer = torch.nn.Linear(*weight.shape[::-1], bias=False, device="cuda", dtype=torch.bfloat16)
        quantize_(layer, Int4WeightOnlyConfig(group_size=128))
        found["torchao int4 g128"] = layer
    except Exception as error:  # whatever keeps a peer from running is its result
        print(f"torchao: {repr(error)[:100]}")
    try:
        import bitsandbytes as bnb

        nf4 = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        found["bitsandbytes nf4"] = nf4.to("cuda")
    except Exception as error:
        print(f"bitsandbytes: {repr(error)[:100]}")
    return found


def time_floats(rows: int, columns: int, tokens: int) -> float:
    """Microseconds of torch's bfloat16 product."""
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    return microseconds(lambda i: x @ weights[i % 5].t(), 10)


def time_packed(cold: list[PackedTensor], tokens: int, activation: ActivationSpec | None) -> float:
    """Microseconds of ours."""
    x = torch.randn(tokens, cold[0].columns, device="cuda", dtype=torch.bfloat16)
    count = len(cold) if tokens < 64 else 4
    return microseconds(lambda i: packed_linear(x, cold[i % len(cold)], activation), count)


def time_peer(peer: Callable[[Tensor], Tensor], columns: int) -> float:
    """Microseconds of one token by another library; of one weight, which the cache may hold."""
    x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    return microseconds(lambda _: peer(x), 10)


def measure(
    rows: int,
    columns: int,
    spec: WeightSpec,
    activation: ActivationSpec | None,
    floats: dict[int, float],
    bandwidth: float,
) -> list[dict[str, Any]]:
    """A row per number of tokens."""
    size = sum(t.numel() * t.element_size() for t in random_packed(rows, columns, spec).tensors().values())
    cold = [random_packed(rows, columns, spec) for _ in range(max(4, COLD_BYTES // size))]
    kernel, copied, results = kernel_of(cold[0], activation, None), small_copy(size), []
    name = f"{spec.format}{spec.bits} group {spec.group_size}{'' if spec.symmetric else ' zero'}"
    name += "" if activation is None else f", {activation}"
    for tokens, float_us in floats.items():
        us = time_packed(cold, tokens, activation)
        results.append(
            {"shape": [rows, columns], "weight": name, "tokens": tokens, "kernel": kernel, "us": us}
            | {"bfloat16_us": float_us, "copy_us": size / bandwidth, "small_copy_us": copied}
        )
        text = f"{rows}x{columns} {name:24} {tokens:4} tokens: {us:7.1f} us, {float_us / us:.2f}x bfloat16"
        if tokens <= 16:
            text += f", {size / bandwidth / us:4.0%} of copy bandwidth, {copied / us:4.0%} of a copy as small"
        print(f"{text} ({kernel})", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 3, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[64, 128, 0], help="0: a row")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": bandwidth / 1e3, "rows": [],
    }  # fmt: skip
    print(f"{results['device']}: copies {bandwidth / 1e3:.0f} GB/s", flush=True)
    specs = [WeightSpec(bits=bits, group_size=group or None) for bits in arguments.bits for group in arguments.groups]
    cases: list[tuple[WeightSpec, ActivationSpec | None]] = [(spec, None) for spec in specs]
    cases += [(WeightSpec(bits=4, group_size=128, symmetric=False), None)]
    cases += [(WeightSpec(format=name, bits=4, group_size=64), None) for name in ("nf", "fp_e2m1")]
    cases += [(WeightSpec(bits=bits), ActivationSpec("int", 8)) for bits in (4, 8)]
    eight = WeightSpec(format="float8_e4m3fn", bits=8)
    cases += [(eight, None), (eight, ActivationSpec("float8_e4m3fn", 8))]
    for rows, columns in SHAPES[:2] if arguments.quick else SHAPES:
        for name, peer in peers(torch.empty(rows, columns)).items():
            results["rows"].append({"shape": [rows, columns], "peer": name, "us": time_peer(peer, columns)})
        floats = {tokens: time_floats(rows, columns, tokens) for tokens in TOKENS}
        for spec, activation in cases:
            results["rows"] += measure(rows, columns, spec, activation, floats, bandwidth)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
