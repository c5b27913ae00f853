"""auto: the budget is met, choices are explained and stored, and the result is not worse than its parts."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.config import ConfigError
from hf_lowbit.plan import packed_modules


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def data() -> Tensor:
    return torch.randint(96, (16, 24), generator=torch.Generator().manual_seed(1))


def auto(**fields: Any) -> Any:
    fields = {"group_size": 32, "tuning": {"epochs": 1}, **fields}
    return hf_lowbit.AutoLowbitConfig(dataset=data(), num_samples=16, sequence_length=24, **fields)


@torch.no_grad()
def divergence(model: Any, other: Any) -> float:
    held = torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(2))
    log = [each(held).logits.log_softmax(-1).flatten(0, -2) for each in (other, model)]
    return float(F.kl_div(*log, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("effort", ["fast", "best"])
def test_it_meets_the_budget_and_says_how(effort: str, tmp_path: Path) -> None:
    model = hf_lowbit.quantize(llama(), auto(bits_per_weight=3.7, effort=effort, iterations=4))
    report = hf_lowbit.report(model)
    assert 3.2 < report.bits_per_weight <= 3.7
    layers = packed_modules(model).values()
    assert len({layer.layer_spec.weight.bits for layer in layers}) > 1
    lines = "\n".join(report.warnings)
    assert "bits per weight of at most 3.7" in lines and "tuned end to end" in lines
    assert ("stream is rotated" in lines) == (effort == "fast") and ("SignRound" in lines) == (effort == "best")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(data()).logits, again(data()).logits)


@pytest.mark.parametrize(
    ("fields", "trains"),
    [
        ({"bits": 2}, True),
        ({"bits": 4, "bits_per_weight": 2.4}, True),
        ({"bits": 3}, False),
        ({"bits": 2, "bits_per_weight": 2.5}, False),
        ({"bits": 2, "effort": "fast"}, False),
        ({"bits": 3, "effort": "best"}, True),
    ],
)
def test_few_bits_are_worth_training_blocks(fields: dict[str, Any], trains: bool) -> None:
    config = auto(**fields)
    assert config.trains_blocks == trains and config.rotates == (not trains)


def test_layers_that_run_together_share_their_bits() -> None:
    model = hf_lowbit.quantize(llama(), auto(bits_per_weight=3.7, tuning=None))
    for block in model.model.layers:
        attention = block.self_attn
        bits = [part.layer_spec.weight.bits for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert len(set(bits)) == 1


def test_each_layer_takes_the_format_that_loses_less() -> None:
    """Normal weights take the levels made for them; uniform ones do not."""
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.uniform_(-0.3, 0.3)
    quantized = hf_lowbit.quantize(model, auto(bits=4, rotate=False, tuning=None))
    formats = {name: layer.layer_spec.weight.format for name, layer in packed_modules(quantized).items()}
    assert formats["model.layers.0.mlp.up_proj"] == "int"
    assert formats["model.layers.1.mlp.down_proj"] == "lloyd"
    only = hf_lowbit.quantize(llama(), auto(bits=4, formats=["int"], tuning=None))
    assert {layer.layer_spec.weight.format for layer in packed_modules(only).values()} == {"int"}


def test_it_is_better_than_gptq_alone() -> None:
    model = llama()
    gptq = hf_lowbit.GPTQConfig(bits=3, group_size=32, dataset=data(), num_samples=16, sequence_length=24)
    clipped = divergence(hf_lowbit.quantize(copy.deepcopy(model), gptq), model)
    plain = divergence(hf_lowbit.quantize(copy.deepcopy(model), dataclasses.replace(gptq, search_clip=False)), model)
    fast = divergence(hf_lowbit.quantize(copy.deepcopy(model), auto(bits=3, tuning={"epochs": 4})), model)
    assert fast < clipped and fast < 0.8 * plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits_per_weight": 0.5}, "bits_per_weight must lie"),
        ({"effort": "most"}, "effort must be"),
        ({"formats": ["nf"]}, "formats must be some of"),
        ({"candidates": [9]}, "candidates must be some of"),
        ({"rotate": 1}, "rotate must be"),
        ({"iterations": 0}, "iterations must be"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        auto(**fields)


def test_a_budget_that_cannot_be_met_changes_nothing() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="bits per weight"):
        hf_lowbit.quantize(model, auto(bits_per_weight=1.5))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
