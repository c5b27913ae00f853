"""Speed of the scan and the convolution on this CPU, against transformers' functions of the same in Python.

    python benchmarks/scan.py [--threads 2] [--tokens 512] [--rounds 7] [--models mamba-130m,...] [--output FILE]

One layer of each size, batch 1: a prompt, and one decoded token with its states changed in place. "float32" and
"int8" (codes in, float32 out of the scan, codes out of the convolution, int8 states) are hf_lowbit's native kernels,
"reference" its torch code. transformers gets its own layout. The four are measured in turn in every round; medians,
and medians of transformers' time as a multiple in the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import Operand, causal_convolution, cpu, quantize_codes, selective_scan

# channels, heads, groups, states
MODELS = {
    "mamba-130m": (1536, 1536, 1, 16),
    "mamba-2.8b": (5120, 5120, 1, 16),
    "mamba2-130m": (1536, 24, 1, 128),
    "mamba2-2.7b": (5120, 80, 1, 128),
}
TAPS = 4
Calls = dict[str, Callable[[], Any]]


def codes(values: Tensor) -> Operand:
    """Quantized with one scale."""
    scale = values.abs().amax().reshape(1) / 127
    return Operand(quantize_codes(values, scale), scale)


def scans(name: str, tokens: int) -> Calls:
    """The scan of one layer, in each way."""
    channels, heads, groups, n = MODELS[name]
    x, z = torch.randn(1, tokens, channels), torch.randn(1, tokens, channels)
    dt, B, C = torch.randn(1, tokens, heads), torch.randn(1, tokens, groups, n), torch.randn(1, tokens, groups, n)
    A = -torch.rand(heads, n) - 0.1 if heads == channels else -torch.rand(heads) - 0.1
    D, bias, state = torch.randn(heads), torch.randn(heads), torch.randn(1, channels, n)
    scale = torch.full((1, n), 0.03)
    calls: Calls = {"transformers": transformers_scan(x, dt, A, B, C, D, z, bias, state.clone())}
    floats = [Operand(v) for v in (x, dt, B, C, z)]
    coded = [codes(v) for v in (x, dt, B, C, z)]
    for way, (own_x, own_dt, own_B, own_C, own_z), states, more in (
        ("float32", floats, state.clone(), {}),
        ("int8", coded, quantize_codes(state, scale), {"state_scale": scale}),
        ("reference", floats, state.clone(), {"backend": "reference"}),
    ):
        kept: dict[str, Any] = {"z": own_z, "dt_bias": bias, "state": states, "update": True, **more}
        calls[way] = partial(selective_scan, own_x, own_dt, A, own_B, own_C, D, **kept)
    return calls


def transformers_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, state: Tensor
) -> Callable[[], Any]:
    """transformers' function for so many tokens. Mamba-2's gate is in its norm there: multiplied here."""
    from transformers.models.mamba import modeling_mamba as first
    from transformers.models.mamba2 import modeling_mamba2 as second

    tokens, heads, width = x.shape[1], A.shape[0], x.shape[2] // A.shape[0]
    if A.dim() == 2:
        if tokens == 1:
            update = first.mamba_selective_state_update
            return lambda: update(state, x[:, 0], dt[:, 0], A, B[:, 0, 0], C[:, 0, 0], D, bias, True, z[:, 0])
        turned = [v.flatten(2).mT.contiguous() for v in (x, dt)]
        b, c, gate = (v.flatten(2).mT.contiguous() for v in (B, C, z))
        more = {"delta_bias": bias, "delta_softplus": True, "return_last_state": True}
        return lambda: first.mamba_selective_scan(*turned, A, b, c, D, gate, **more)
    if tokens == 1:
        states = state.unflatten(1, (heads, width))
        wide = [v[..., None].expand(*v.shape, width) for v in (dt[:, 0], D, bias)]
        decays = A[:, None, None].expand(heads, width, B.shape[3])
        arguments = x.view(1, heads, width), wide[0], decays, B[:, 0], C[:, 0], wide[1], wide[2], True
        gate = z.view(1, heads, width)
        return lambda: second.mamba2_selective_state_update(states, *arguments) * torch.nn.functional.silu(gate)
    split = x.unflatten(2, (heads, width)), dt, A, B, C
    more = {"D": D, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
    scan = second.mamba2_chunk_scan
    return lambda: scan(*split, chunk_size=256, **more)[0].flatten(2) * torch.nn.functional.silu(z)


def convolutions(name: str, tokens: int) -> Calls:
    """The convolution of one layer, in each way."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn, causal_conv1d_update

    channels, heads, groups, n = MODELS[name]
    channels += 0 if heads == channels else 2 * groups * n
    x, weight, bias = torch.randn(1, tokens, channels), torch.randn(channels, TAPS), torch.randn(channels)
    turned, past, one = x.mT.contiguous(), torch.zeros(1, channels, TAPS), torch.tensor([0.03])
    if tokens == 1:
        calls: Calls = {"transformers": lambda: causal_conv1d_update(turned, past, weight, bias, "silu")}
    else:
        calls = {"transformers": lambda: causal_conv1d_fn(turned, weight, bias, "silu")}
    for way, operand, dtype, more in (
        ("float32", Operand(x), torch.float32, {}),
        ("int8", codes(x), torch.int8, {"out_scale": one}),
        ("reference", Operand(x), torch.float32, {"backend": "reference"}),
    ):
        state = torch.zeros(1, channels, TAPS, dtype=dtype)
        calls[way] = partial(causal_convolution, operand, weight, bias, state, update=True, **more)
    return calls


def measure(calls: Calls, rounds: int, least: float = 0.02) -> dict[str, float]:
    """Microseconds of each way, and how many times as long transformers took in the same round."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    repeats = {}
    for way, call in calls.items():
        call()
        begun = time.perf_counter()
        call()
        repeats[way] = max(1, min(1000, int(least / (time.perf_counter() - begun))))
    for _ in range(rounds):
        for way, call in calls.items():
            begun = time.perf_counter()
            for _ in range(repeats[way]):
                call()
            times[way].append(1e6 * (time.perf_counter() - begun) / repeats[way])
    result = {f"{way}_us": statistics.median(values) for way, values in times.items()}
    for way in list(calls)[1:]:
        ratios = [float(a / b) for a, b in zip(times["transformers"], times[way], strict=True)]
        result[f"{way}_times_as_fast"] = statistics.median(ratios)
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "instruction_set": cpu.instruction_set(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rows": [],
    }
    for name in arguments.models.split(","):
        for tokens in (1, arguments.tokens):
            for what, make in (("scan", scans), ("convolution", convolutions)):
                with torch.no_grad():
                    row = measure(make(name, tokens), arguments.rounds)
                results["rows"].append({"model": name, "tokens": tokens, "what": what, **row})
                each = [f"{way} {row[f'{way}_us']:9.0f} us" for way in ("transformers", "float32", "int8", "reference")]
                fast = [f"{row[f'{way}_times_as_fast']:.1f}x" for way in ("float32", "int8", "reference")]
                print(f"{name:12} {tokens:4} tokens, {what:11}: {', '.join(each)}; {' / '.join(fast)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
