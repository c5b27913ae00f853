"""The time that Python and torch take around a packed layer while a model generates, on a CPU or an NVIDIA GPU.

    python benchmarks/host_time.py [--device cpu|cuda] [--layers 16] [--profile] [--output host_time.json]

Matrices are so small that a token takes the host's time: products take next to nothing on a CPU, and on a GPU they end
before the next is launched. "call" is one layer called again and again, "siblings" query, key and value of one input,
"token" a step of a Llama in `generate`, where the processor's caches have seen other code in between; the rows take
turns. `--profile` lists the functions of a packed model's steps by their own time.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.nn import PackedModule, disconnect_siblings

WIDTH, VOCABULARY = 128, 512
PROMPT, NEW_TOKENS = 8, 32
ROUNDS, CALLS = 7, 300
_FOUR = {"bits": 4, "group_size": 32, "quantize_embeddings": True, "quantize_lm_head": True}


def llama(layers: int, device: str) -> LlamaForCausalLM:
    """Of a width that takes no time."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval()


def models(layers: int, device: str) -> dict[str, Any]:
    """Name -> model; in the last one no layers compute together."""
    found = {"bfloat16": llama(layers, device)}
    for name in ("4 bits", "4 bits, each alone"):
        found[name] = hf_lowbit.quantize(llama(layers, device), hf_lowbit.RTNConfig(**_FOUR))
    disconnect_siblings(found["4 bits, each alone"])
    return found


def seconds(call: Callable[[], Any], device: str) -> float:
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def generation(model: Any, device: str) -> Callable[[int], Any]:
    """A greedy continuation by so many tokens."""
    prompt = torch.randint(10, VOCABULARY, (1, PROMPT), device=device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    return lambda count: model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)


def token_us(found: dict[str, Any], device: str) -> dict[str, float]:
    """Microseconds of a step: of many tokens less one, so without the prefill."""
    times: dict[str, list[float]] = {name: [] for name in found}
    calls = {name: generation(model, device) for name, model in found.items()}
    for _ in range(1 + ROUNDS):
        for name, call in calls.items():
            first = seconds(lambda call=call: call(1), device)
            times[name].append((seconds(lambda call=call: call(1 + NEW_TOKENS), device) - first) / NEW_TOKENS)
    return {name: 1e6 * statistics.median(values[1:]) for name, values in times.items()}


@torch.no_grad()
def call_us(layers: Sequence[nn.Module], device: str) -> float:
    """Microseconds of a call of each layer with one token ``[1, 1, columns]``."""
    x = torch.randn(1, 1, layers[0].in_features, dtype=torch.bfloat16, device=device)

    def calls() -> None:
        for _ in range(CALLS):
            for layer in layers:
                layer(x)

    return 1e6 * statistics.median([seconds(calls, device) for _ in range(1 + ROUNDS)][1:]) / CALLS


def measure(layers: int, device: str) -> dict[str, Any]:
    """Rows by name; "layer_us" is what a packed layer adds to a step, beyond what a plain one takes in it."""
    found = models(layers, device)
    rows = {name: {"token_us": us} for name, us in token_us(found, device).items()}
    packed = sum(isinstance(module, PackedModule) for module in found["4 bits"].modules())
    for name, row in rows.items():
        attention = found[name].model.layers[0].self_attn
        row["call_us"] = call_us([attention.o_proj], device)
        row["siblings_us"] = call_us([attention.q_proj, attention.k_proj, attention.v_proj], device)
        row["layer_us"] = (row["token_us"] - rows["bfloat16"]["token_us"]) / packed
    return {"device": device, "layers": layers, "packed": packed, "rows": rows}


def profiled(layers: int, device: str) -> None:
    """Functions of a packed model's steps, by own time."""
    call = generation(models(layers, device)["4 bits"], device)
    call(NEW_TOKENS)
    profiler = cProfile.Profile()
    profiler.runcall(call, NEW_TOKENS)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    if options.profile:
        return profiled(options.layers, options.device)
    report = measure(options.layers, options.device)
    for name, row in report["rows"].items():
        print(f"{name:20}", ", ".join(f"{key[:-3]} {value:.1f} us" for key, value in row.items()))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
