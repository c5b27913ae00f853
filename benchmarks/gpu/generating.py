"""Prefill, and decoding: in transformers' `generate`, and as one CUDA graph of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CompileConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from gpu.timing import microseconds

PROMPT, NEW_TOKENS = 128, 32
TURNS = 7
_ROUNDS, _GRAPH_STEPS = 3, 8
_CACHE = 256  # tokens that the static cache of a graph has room for: the prompt and every replay
# Arguments of generate by how it is called: with a cache that grows, layer by layer from Python; with CUDA graphs.
GENERATE: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {
        "cache_implementation": "static",
        "compile_config": CompileConfig(fullgraph=True, mode="reduce-overhead"),
    },
}


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when new tokens have arrived on the CPU. `generate` gives the prompt first, at its start."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        """Median between two tokens, so without the prefill."""
        return statistics.median(later - one for one, later in zip(self.times[1:-1], self.times[2:], strict=True))


def prompt_of(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Random tokens ``[batch, tokens]``: speed does not depend on them."""
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randint(10, model.config.vocab_size, (batch, tokens), device="cuda", generator=generator)


def prefill(model: Any, tokens: int) -> float:
    """Tokens per second of a forward pass of one prompt; median of some after a first."""
    prompt, times = prompt_of(model, 1, tokens), []
    for _ in range(1 + _ROUNDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return tokens / statistics.median(times[1:])


def generate(models: Mapping[str, Any], arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Greedy continuations of one prompt by several models, which take turns: name -> what was measured.

    "tokens_per_s" are those after the first, of the fastest of TURNS calls, "turns" of each: the speed of a shared
    machine's processor changes from one second to the next. "first_call_s" is what a call before these took, compiling
    included. Nothing is profiled here: a profiler of the GPU makes every later launch of the process dearer, those of
    other models, too.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        begun = time.perf_counter()
        _continue(model, TokenClock(), arguments)
        found[name] = {"first_call_s": time.perf_counter() - begun, "turns": []}
    for _ in range(TURNS):
        for name, model in models.items():
            clock = TokenClock()
            _continue(model, clock, arguments)
            found[name]["turns"].append(1 / clock.seconds())
    return {name: {"tokens_per_s": max(row["turns"]), **row} for name, row in found.items()}


def _continue(model: Any, clock: TokenClock, arguments: dict[str, Any]) -> None:
    prompt = prompt_of(model, 1, PROMPT)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        streamer=clock, **arguments,
    )  # fmt: skip


def graph_of_a_step(model: Any, batch: int) -> dict[str, float]:
    """Tokens per second of all sequences of a batch, from a CUDA graph of steps: Python takes no time.

    The graph is of the uncompiled model with a static cache.
    """
    cache = StaticCache(config=model.config, max_cache_len=_CACHE)
    model(prompt_of(model, batch, PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt_of(model, batch, 1)
    us = microseconds(lambda _: model(token, past_key_values=cache, use_cache=True), _GRAPH_STEPS)
    return {"tokens_per_s": batch * 1e6 / us, "gpu_ms": us / 1e3}
