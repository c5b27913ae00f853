"""Whole models with random weights, shaped as Llama-3.2-1B and Llama-3-8B, as floats and packed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from gpu.generating import GENERATE, generate, graph_of_a_step, prefill

_LLAMA: dict[str, Any] = {
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "bos_token_id": None, "eos_token_id": None,  # nothing ends a sequence before its time
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
PREFILLS = (512, 2048)
BATCHES = (1, 16)


class Variant(NamedTuple):
    """A row: fields of RTNConfig, None for the floats; whether `generate` is measured."""

    name: str
    fields: Mapping[str, Any] | None = None
    generates: bool = False


_ENDS = {"quantize_embeddings": True, "quantize_lm_head": True}
VARIANTS = (
    Variant("bfloat16", generates=True),
    Variant("4 bits", {"bits": 4, "group_size": 128, **_ENDS}, generates=True),
    Variant("4 bits, ends bfloat16", {"bits": 4, "group_size": 128}),
    Variant("8 bits", {"bits": 8, "group_size": None, **_ENDS}),
    Variant("3 bits", {"bits": 3, "group_size": 128, **_ENDS}),
)


@torch.no_grad()
def measure(shape: str, variants: Sequence[Variant], bandwidth: float, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds, tokens/s and bytes of a shape's models, with `generate` in some ways; what fails says so in its place.

    "bound" is how many tokens/s reading every weight once would allow at the bandwidth, in bytes per microsecond; keys
    and values are left out. "memory_bytes" are of weights, "prefill_peak_bytes" of the longest prompt.
    """
    rows: dict[str, dict[str, Any]] = {}
    generating: dict[str, Any] = {}
    for variant in variants:
        _empty_device()
        before = torch.cuda.memory_allocated()
        row, model = _packed(shape, variant)
        rows[variant.name] = row | facts(model, bandwidth, before) | speeds(model, before)
        if variant.generates:
            generating[variant.name] = model
        del model
    for way in ways:
        for models in _taking_turns(way, generating):
            torch.compiler.reset()
            for name, found in _told(generate, models, GENERATE[way], names=models).items():
                rows[name][way] = found
    return list(rows.values())


def _taking_turns(way: str, models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Together where Python is what takes the time; what is compiled is one model's at a time."""
    return [dict(models)] if way == "eager" else [{name: model} for name, model in models.items()]


def _packed(shape: str, variant: Variant) -> tuple[dict[str, Any], Any]:
    """The beginning of a row, and its model."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"shape": shape, "variant": variant.name}
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**_LLAMA, **SHAPES[shape]), dtype=torch.bfloat16).eval()
    if variant.fields is not None:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model = hf_lowbit.quantize(model, hf_lowbit.RTNConfig(**variant.fields))
        torch.cuda.synchronize()
        row["pack_s"] = time.perf_counter() - begun
    return row, model


def facts(model: Any, bandwidth: float, before: int) -> dict[str, Any]:
    """Bytes, those that were allocated before left out, and the bound that they set."""
    gc.collect()  # floats that were packed
    read, taken = read_bytes(model), torch.cuda.memory_allocated() - before
    return {"memory_bytes": taken, "read_bytes": read, "bound": bandwidth * 1e6 / read}


def speeds(model: Any, before: int) -> dict[str, Any]:
    """Tokens per second but for `generate`, and the peak of memory."""
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {f"prefill_{tokens}": prefill(model, tokens) for tokens in PREFILLS}
    found["prefill_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    for batch in BATCHES:
        found[f"graph_{batch}"] = _told(graph_of_a_step, model, batch)
    return found


def read_bytes(model: torch.nn.Module) -> int:
    """Of all weights that a token reads: all but an embedding that no head multiplies with."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        size -= sum(parameter.numel() * parameter.element_size() for parameter in embedding.parameters())
    return size


def _told(call: Callable[..., dict[str, Any]], *arguments: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """What was measured, or how it failed: of each name, if there are some."""
    try:
        return dict(call(*arguments))
    except Exception as error:
        failed = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        return failed if names is None else dict.fromkeys(names, failed)


def _empty_device() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
