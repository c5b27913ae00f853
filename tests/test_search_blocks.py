"""The choice of blocks that are worth more: measured by swapping, the same each time, quantizing as it says."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit.calibration.divergence import logit_divergence, logits_of
from hf_lowbit.config import ConfigError
from hf_lowbit.plan import packed_modules
from hf_lowbit.search import search_blocks
from tests.matrix.models import fingerprint
from tests.plugins.outliers import outlier_llama, token_batches

CONFIG = hf_lowbit.RTNConfig(bits=8, group_size=None, activation_bits=4, num_samples=8)


@torch.no_grad()
def divergence(model: nn.Module, reference: nn.Module) -> float:
    """Mean KL over the tokens of the first batch."""
    batch = token_batches()[0]
    return float(logit_divergence(logits_of(reference, batch), logits_of(model, batch)).mean())


def test_the_block_that_loses_most_is_found() -> None:
    model = outlier_llama(3)
    model.model.layers[1].mlp.down_proj.weight.data *= 20
    before = fingerprint(model)
    found = search_blocks(model, CONFIG, token_batches(), count=1, kl_samples=2)
    assert fingerprint(model) == before and not packed_modules(model)
    assert found == search_blocks(model, CONFIG, token_batches(), count=1, kl_samples=2)
    assert found.blocks == (max(found.losses, key=found.losses.__getitem__),)
    for name, loss in found.losses.items():
        better = {other: {"activation_bits": None} for other in found.losses if other != name}
        alone = hf_lowbit.quantize(copy.deepcopy(model), replace(CONFIG, overrides=better))
        assert loss == pytest.approx(divergence(alone, model), rel=1e-3) and loss > found.least
    hf_lowbit.quantize(model, found.config)
    full = {name for name, module in packed_modules(model).items() if module.layer_spec.activation is None}
    assert full == {name for name in packed_modules(model) if name.startswith(f"{found.blocks[0]}.")}


def test_overrides_keep_their_other_fields() -> None:
    config = replace(CONFIG, overrides={r".*\.q_proj": {"bits": 6}})
    found = search_blocks(outlier_llama(), config, token_batches(), count=2)
    for index in range(2):
        query, key = (found.config.layer_spec(f"model.layers.{index}.self_attn.{name}_proj") for name in "qk")
        assert query.weight.bits == 6 and key.weight.bits == 8
        assert query.activation is None and key.activation is None
    assert found.config.layer_spec("elsewhere.q_proj").activation is not None


def test_no_blocks_leave_the_config_alone() -> None:
    found = search_blocks(outlier_llama(), CONFIG, token_batches(), count=0)
    assert found.blocks == () and found.config.same_request(CONFIG)
    assert len(search_blocks(outlier_llama(), CONFIG, token_batches(2)[:1] * 4).blocks) == 1, "a quarter, but one"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 3}, "count must be a number of blocks, from 0 to 2, not 3"),
        ({"count": 1.0}, "count must be a number of blocks"),
        ({"kl_samples": 0}, "kl_samples must be a positive integer, not 0"),
        ({"better": {"bats": 3}}, r"cannot set bats"),
        ({"data": None}, "needs calibration data"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search_blocks(outlier_llama(), CONFIG, **{"data": token_batches(), **values})


def test_models_without_blocks_or_quantized_already() -> None:
    with pytest.raises(ConfigError, match="has no list of blocks"):
        search_blocks(nn.Sequential(nn.Linear(8, 8)), CONFIG, token_batches())
    quantized = hf_lowbit.quantize(outlier_llama(), CONFIG)
    with pytest.raises(ConfigError, match="quantized already"):
        search_blocks(quantized, CONFIG, token_batches())
    assert torch.is_grad_enabled()
