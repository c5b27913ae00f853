"""Packed mixers of every architecture, while everything in them is still float: they compute what the library does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.integrations.tiny_state_space import TINY, packed_floats, relative, step, tokens

LIMIT = 1e-4


@pytest.fixture(params=TINY)
def pair(request: Any) -> tuple[Any, Any]:
    """The library's model, and the same with packed mixers."""
    stock = TINY[request.param].create()
    return stock, packed_floats(TINY[request.param].create())


def mask_of(batch: int, length: int, padding: int, side: str = "left") -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(padding) if side == "left" else slice(length - padding, None)] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 21])
def test_prefill(pair: tuple[Any, Any], length: int) -> None:
    stock, packed = pair
    x = tokens(2, length)
    assert relative(packed(x, use_cache=False).logits, stock(x, use_cache=False).logits) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair: tuple[Any, Any], side: str) -> None:
    x, mask = tokens(2, 13), mask_of(2, 13, 4, side)
    real = mask.bool()
    ours, theirs = (model(x, attention_mask=mask, use_cache=False).logits[real] for model in pair)
    assert relative(ours, theirs) < LIMIT


@torch.no_grad()
def test_what_is_padded_does_not_count(pair: tuple[Any, Any]) -> None:
    """A sequence's logits are those that it has alone; but the convolution reads, in the library too, what a biased
    in_proj makes of a padded token.
    """
    _, packed = pair
    mixers = [module for _, module in packed.named_modules() if hasattr(module, "A_log")]
    is_biased = any(mixer.in_proj.bias is not None for mixer in mixers)
    x, mask = tokens(2, 13), mask_of(2, 13, 4)
    x[0, :4] = 0
    change = relative(packed(x, attention_mask=mask).logits[0, 4:], packed(x[:1, 4:]).logits[0])
    assert (change > LIMIT) == is_biased


@torch.no_grad()
def test_cached_decoding(pair: tuple[Any, Any]) -> None:
    """Token by token after a prefill; and the cache holds what the library's does, in its shapes."""
    x = tokens(2, 12)
    caches = [DynamicCache(config=model.config) for model in pair]
    for part in (x[:, :7], *x[:, 7:].split(1, 1)):
        theirs, ours = (step(model, part, cache) for model, cache in zip(pair, caches, strict=True))
        assert relative(ours, theirs) < LIMIT
    for name, module in pair[0].named_modules():
        if hasattr(module, "A_log"):
            index = module.layer_idx
            for read in ("get_conv_state", "get_recurrent_state"):
                theirs, ours = (getattr(cache, read)(index) for cache in caches)
                assert ours.shape == theirs.shape, name
                assert relative(ours, theirs) < LIMIT


@torch.no_grad()
def test_a_first_token_alone(pair: tuple[Any, Any]) -> None:
    """A prefill shorter than the convolution."""
    _, packed = pair
    x = tokens(1, 6)
    cache = DynamicCache(config=packed.config)
    parts = [step(packed, part, cache) for part in x.split(1, 1)]
    assert relative(torch.cat(parts, 1), packed(x, use_cache=False).logits) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[8, 8], [1, 9, 6], [13, 2, 1]])
def test_chunked_prefill(pair: tuple[Any, Any], cuts: list[int]) -> None:
    """Also for Mamba-1 and its relatives, whose library code starts each chunk from an empty state."""
    _, packed = pair
    x = tokens(2, 16)
    cache = DynamicCache(config=packed.config)
    parts = [step(packed, part, cache) for part in x.split(cuts, 1)]
    assert relative(torch.cat(parts, 1), packed(x, use_cache=False).logits) < LIMIT


@torch.no_grad()
def test_a_mask_that_grew_with_the_cache(pair: tuple[Any, Any]) -> None:
    """Masks may cover all tokens so far, as in a loop of one's own; the mixer takes the last of them."""
    _, packed = pair
    x, mask = tokens(2, 12), mask_of(2, 12, 3)
    whole = packed(x, attention_mask=mask, use_cache=False).logits
    cache, start = DynamicCache(config=packed.config), 0
    for part in x.split([7, 3, 1, 1], 1):
        stop = start + part.shape[1]
        logits = step(packed, part, cache, attention_mask=mask[:, :stop])
        assert relative(logits[mask[:, start:stop].bool()], whole[:, start:stop][mask[:, start:stop].bool()]) < LIMIT
        start = stop


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no_cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("padded", [False, True])
def test_generates_the_same_tokens(pair: tuple[Any, Any], how: str, padded: bool) -> None:
    x, mask = tokens(2, 9), mask_of(2, 9, 4 if padded else 0)
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **GENERATION[how]}
    theirs, ours = (model.generate(x, attention_mask=mask, **asked) for model in pair)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_static_and_reset_caches(pair: tuple[Any, Any]) -> None:
    """A reset cache is an empty one."""
    _, packed = pair
    x = tokens(2, 8)
    for cache in (DynamicCache(config=packed.config), StaticCache(config=packed.config, max_cache_len=16)):
        logits = step(packed, x, cache)
        step(packed, x[:, :1], cache)
        cache.reset()
        assert relative(step(packed, x, cache), logits) < 1e-6


def test_gradients_reach_everything_that_is_float(pair: tuple[Any, Any]) -> None:
    """The training path is the library's: the same loss, the same gradients."""
    x = tokens(2, 11)
    losses = []
    for model in pair:
        model.train()
        losses.append(model(x, labels=x, use_cache=False).loss)
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    theirs = dict(pair[0].named_parameters())
    for name, parameter in pair[1].named_parameters():
        if parameter.requires_grad and theirs[name].grad is not None and theirs[name].grad.abs().max() > 1e-6:
            assert parameter.grad is not None, name
            assert relative(parameter.grad, theirs[name].grad) < 1e-3, name


@torch.no_grad()
def test_limits_of_time_steps_are_the_librarys(pair: tuple[Any, Any]) -> None:
    """transformers bounds the steps of every prefill and not those of single tokens: so do packed mixers."""
    if not hasattr(next(m for m in pair[0].modules() if hasattr(m, "A_log")), "time_step_limit"):
        assert not any(hasattr(module, "time_step_limit") for module in pair[1].modules())  # Mamba-1 has none
        return
    x = tokens(2, 10)
    caches = [DynamicCache(config=model.config) for model in pair]
    unlimited = pair[1](x, use_cache=False).logits
    for model in pair:
        for mixer in (module for module in model.modules() if hasattr(module, "A_log")):
            mixer.time_step_limit = (0.4, 0.6)
    assert relative(pair[1](x, use_cache=False).logits, unlimited) > 0.05
    for part in x.split([4, 1, 4, 1], 1):
        theirs, ours = (step(model, part, cache) for model, cache in zip(pair, caches, strict=True))
        assert relative(ours, theirs) < LIMIT
