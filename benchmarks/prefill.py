"""Prompts: SmolLM2-135M packed against its bfloat16 original, both in one warm process, in turn.

    python benchmarks/prefill.py [--bits 4] [--tokens 512] [--rounds 20] [--threads 2]

Fresh processes, which benchmarks/models_cpu.py measures, differ by a third from one to the next: by which pages their
heaps were given. Here every round has one prompt of each model, in random order, and the ratio is the median over the
rounds. Models are quantized when they are loaded, embedding and head too.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import RTNConfig, testbed

WARM_UP = 3


def seconds(model: Any, prompt: torch.Tensor) -> float:
    """Of one forward pass over the prompt."""
    begun = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begun


def compare(models: dict[str, Any], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; a place in all lists is one round."""
    prompt = torch.randint(0, 49000, (1, tokens), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(0)
    with torch.no_grad():
        for model in models.values():
            for _ in range(WARM_UP):
                seconds(model, prompt)
        for _ in range(rounds):
            for name in order.sample(list(models), len(models)):
                times[name].append(seconds(models[name], prompt))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    folder, dtype = testbed.smollm2(), torch.bfloat16
    models = {"bfloat16": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)}
    for bits in chosen.bits:
        config = RTNConfig(bits=bits, group_size=64)
        models[f"{bits} bits"] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    for tokens in chosen.tokens:
        times = compare(models, tokens, chosen.rounds)
        for name, of_model in times.items():
            rate = tokens / statistics.median(of_model)
            ratio = statistics.median(base / own for base, own in zip(times["bfloat16"], of_model, strict=True))
            print(f"{tokens:5d} tokens  {name:10s} {rate:7.0f} tokens/s, {ratio:.3f} times bfloat16", flush=True)


if __name__ == "__main__":
    main()
