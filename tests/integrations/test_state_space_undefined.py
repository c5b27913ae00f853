"""A NaN that reaches a quantized mixer: the token's own logits are NaN, and no other token's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.nn import PackedMixer
from tests.integrations.tiny_state_space import TINY, loaded, packed_floats, relative, tokens

TOKEN = 5


@pytest.fixture(params=["mamba", "mamba2"])
def name(request: Any) -> str:
    return str(request.param)


def embedded(model: Any) -> tuple[Tensor, Tensor]:
    """Embeddings of two sequences of 12 tokens, and the same with a NaN in one token of the first."""
    good = model.get_input_embeddings()(tokens(2, 12)).detach()
    bad = good.clone()
    bad[0, TOKEN, 3] = torch.nan
    return good, bad


@pytest.mark.parametrize("backend", [None, "reference"])
@torch.no_grad()
def test_codes_carry_none_to_later_tokens(name: str, backend: str | None) -> None:
    """Its codes are 0 in the convolution and the state; the residual keeps it where it is. All paths agree."""
    model = loaded(name)
    good, bad = embedded(model)
    results = []
    for own in (backend, None):
        for module in model.modules():
            if isinstance(module, PackedMixer):
                module.backend = own
        results.append(model(inputs_embeds=bad, use_cache=False).logits)
    found, expected = results[0], model(inputs_embeds=good, use_cache=False).logits
    assert torch.equal(found.isnan(), results[1].isnan())
    assert relative(found.nan_to_num(), results[1].nan_to_num()) < 1e-5
    assert found.isnan().any(-1).nonzero().tolist() == [[0, TOKEN]] and found[0, TOKEN].isnan().all()
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0, :TOKEN], expected[0, :TOKEN])


@torch.no_grad()
def test_nor_does_the_state(name: str) -> None:
    model = loaded(name)
    cache = model(inputs_embeds=embedded(model)[1], use_cache=True).cache_params
    for place in range(3):
        logits = model(tokens(2, 3)[:, place : place + 1], cache_params=cache, use_cache=True).logits
        assert logits.isfinite().all()


@torch.no_grad()
def test_floats_carry_it_on(name: str) -> None:
    """As in transformers, whose scan of Mamba-2 takes it to earlier tokens of the chunk as well."""
    stock, packed = TINY[name].create(), packed_floats(TINY[name].create())
    given = embedded(stock)[1]
    expected, found = (model(inputs_embeds=given, use_cache=False).logits.isnan() for model in (stock, packed))
    assert found[0, TOKEN:].all() and not found[0, :TOKEN].any() and not found[1].any()
    assert expected[0, TOKEN:].all() and not expected[1].any()
