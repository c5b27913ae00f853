"""Logits of the held-out windows: in one pass, and token by token through the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambas.settings import TEXT, TRAINED, Settings


def held_out(settings: Settings) -> Tensor:
    """Token ids [windows, length], each with BOS first; a shorter last window is left out."""
    from transformers import AutoTokenizer

    from hf_lowbit.evaluation import split_windows, tokenize

    tokenizer = AutoTokenizer.from_pretrained(TRAINED[settings.model])
    ids = tokenize(tokenizer, (TEXT / "held_out.txt").read_text(encoding="utf-8"), settings.tokens)
    windows = split_windows(ids, settings.length, tokenizer.bos_token_id)
    return torch.stack([window for window in windows if window.numel() == settings.length])


@torch.no_grad()
def in_one_pass(model: Any, windows: Tensor, batch: int = 8) -> Tensor:
    """Float32 [windows, length, vocabulary]."""
    return torch.cat([model(part, use_cache=False).logits.float() for part in windows.split(batch)])


@torch.no_grad()
def token_by_token(model: Any, windows: Tensor, prompt: int) -> Tensor:
    """Float32 [windows, length - prompt + 1, vocabulary]: after the prompt, and after every token that follows it."""
    first = model(windows[:, :prompt], use_cache=True)
    logits, cache = [first.logits[:, -1:].float()], first.cache_params
    for place in range(prompt, windows.shape[1]):
        output = model(windows[:, place : place + 1], cache_params=cache, use_cache=True)
        logits.append(output.logits.float())
    return torch.cat(logits, 1)


@torch.no_grad()
def state_bytes(model: Any, windows: Tensor) -> int:
    """What one sequence keeps in the cache after a prompt."""
    cache = model(windows[:1], use_cache=True).cache_params
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("conv_states", "recurrent_states")]
    return sum(state.numel() * state.element_size() for state in _tensors(states))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in values for tensor in _tensors(item)]
