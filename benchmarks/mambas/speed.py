"""Time of a prompt and of a decoded token: all rows in turn in every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mambas.models import load, source
from mambas.rows import REFERENCE, Row

PROMPT, BEFORE, DECODED = 512, 64, 16  # tokens of a prompt; before the tokens that are decoded; of those


def measure_speed(model: str, rows: Sequence[Row], rounds: int, work: Path) -> list[dict[str, Any]]:
    """One entry for each row, the first of which is the float one; what cannot run says why."""
    folder, data = source(model, work)
    models: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for row in rows:
        try:
            models[row.name] = load(row, folder, data)
            one_round(models[row.name])  # what is set up once is not timed
        except Exception as error:
            models.pop(row.name, None)
            failed[row.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"{model} {row.name}: {failed.get(row.name, 'ready')}", flush=True)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, quantized in models.items():
            taken[name].append(one_round(quantized))
    facts: dict[str, dict[str, Any]] = {name: {"failed": reason} for name, reason in failed.items()}
    facts |= {name: summary(times, taken[REFERENCE]) for name, times in taken.items()}
    return [{"name": row.name, "method": row.method, "fields": row.fields, **facts[row.name]} for row in rows]


@torch.no_grad()
def one_round(model: Any) -> dict[str, float]:
    """Milliseconds: "prefill" of a prompt, "decode" of one token."""
    ids = torch.randint(1, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - started
    cache = model(ids[:, :BEFORE], use_cache=True, logits_to_keep=1).cache_params
    model(ids[:, :1], cache_params=cache, use_cache=True)
    started = time.perf_counter()
    for place in range(DECODED):
        model(ids[:, place : place + 1], cache_params=cache, use_cache=True)
    return {"prefill": 1e3 * prefill, "decode": 1e3 * (time.perf_counter() - started) / DECODED}


def summary(own: Sequence[Mapping[str, float]], reference: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians over the rounds; a speedup of 2 is half the reference's time in the same round."""
    facts = {}
    for name in own[0]:
        facts[f"{name}_ms"] = statistics.median(times[name] for times in own)
        ratios = [other[name] / times[name] for times, other in zip(own, reference, strict=True)]
        facts[f"{name}_speedup"] = statistics.median(ratios)
    return facts
