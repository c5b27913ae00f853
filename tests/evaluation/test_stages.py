"""Four stages: what each of them is, and that each is derived from the right weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.evaluation import evaluate_language_model, evaluate_stages, quantize_for_stages
from hf_lowbit.tensorwise import QuantizationError
from tests.evaluation.tiny import TEXT, VOCABULARY, tiny_llama, tiny_tokenizer

LENGTH = 32


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(2, VOCABULARY, (1, 24), generator=generator)} for _ in range(count)]


def stages_of(config: Any) -> tuple[dict[str, Any], Any, Any]:
    """The result, the quantized model and the float one."""
    reference = tiny_llama().eval()
    model = copy.deepcopy(reference)
    method = hf_lowbit.methods()[str(config.quant_method).removeprefix("lowbit_")]
    weights = quantize_for_stages(model, config, batches() if method.needs_data else None)
    result = evaluate_stages(model, reference, tiny_tokenizer(), TEXT, weights=weights, sequence_length=LENGTH)
    return result, model, reference


def test_rounding_and_quantized_inputs_are_told_apart() -> None:
    result, model, reference = stages_of(hf_lowbit.RTNConfig(bits=3, group_size=8, activation_bits=4))
    stages = result["stages"]
    assert list(stages) == ["float", "transformed", "rounded", "packed"]
    assert stages["transformed"]["kl"] == 0.0  # rounding to nearest rewrites nothing

    expected = evaluate_language_model(model, tiny_tokenizer(), TEXT, reference=reference, sequence_length=LENGTH)
    assert {name: value for name, value in result.items() if name != "stages"} == expected
    assert stages["packed"] == {name: expected[name] for name in ("perplexity", "kl", "top1_agreement", "intervals")}
    alone = evaluate_language_model(reference, tiny_tokenizer(), TEXT, sequence_length=LENGTH)
    assert stages["float"] == {name: alone[name] for name in ("perplexity", "intervals")}

    restored = hf_lowbit.dequantize(copy.deepcopy(model), torch.float32)
    rounded = evaluate_language_model(restored, tiny_tokenizer(), TEXT, reference=reference, sequence_length=LENGTH)
    assert stages["rounded"]["kl"] == rounded["kl"] < stages["packed"]["kl"]


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("smoothquant", {"bits": 4}),  # folds scales into norms
        ("awq", {"bits": 3, "group_size": 8}),  # and into other layers
        ("gptq", {"bits": 3, "group_size": 8, "quantize_embeddings": True}),
        ("quarot", {"bits": 3}),  # rotates the whole model
        ("quip", {"bits": 3}),  # and single layers
        ("spqr", {"bits": 3, "group_size": 8}),  # keeps some weights
    ],
)
def test_exact_rewrites_cost_nothing(method: str, fields: dict[str, Any]) -> None:
    config = hf_lowbit.methods()[method].config_class(num_samples=4, **fields)
    stages = stages_of(config)[0]["stages"]
    assert stages["transformed"]["kl"] < 1e-6 < 1e-2 < stages["rounded"]["kl"]


def test_a_rewrite_that_is_not_exact_shows() -> None:
    stages = stages_of(hf_lowbit.QLLMConfig(bits=4, activation_bits=4, epochs=0, num_samples=4))[0]["stages"]
    assert 1e-3 < stages["transformed"]["kl"] < stages["rounded"]["kl"] < stages["packed"]["kl"]  # merged channels


@pytest.mark.parametrize("keep", ["branch", "adapter"])
def test_compensation_counts_as_rounding(keep: str) -> None:
    if keep == "adapter":
        pytest.importorskip("peft")
    plain = stages_of(hf_lowbit.RTNConfig(bits=2, group_size=8))[0]["stages"]
    low_rank = hf_lowbit.LowRankConfig(rank=4, keep=keep)
    stages = stages_of(hf_lowbit.RTNConfig(bits=2, group_size=8, low_rank=low_rank))[0]["stages"]
    assert stages["transformed"]["kl"] == 0.0
    assert stages["rounded"]["kl"] == pytest.approx(stages["packed"]["kl"], rel=1e-3)
    assert stages["rounded"]["kl"] < plain["rounded"]["kl"]


def test_tied_weights_are_one() -> None:
    torch.manual_seed(0)
    reference = tiny_llama().eval()
    reference.config.tie_word_embeddings = True
    reference.tie_weights()
    model = copy.deepcopy(reference)
    weights = quantize_for_stages(model, hf_lowbit.RTNConfig(bits=3, group_size=8, quantize_lm_head=True))
    result = evaluate_stages(model, reference, tiny_tokenizer(), TEXT, weights=weights, sequence_length=LENGTH)
    assert result["stages"]["transformed"]["kl"] == 0.0 < result["stages"]["rounded"]["kl"]


def test_without_weights_the_models_are_left_alone() -> None:
    reference = tiny_llama().eval()
    model = hf_lowbit.quantize(copy.deepcopy(reference), hf_lowbit.RTNConfig(bits=3, group_size=8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = evaluate_stages(model, reference, tiny_tokenizer(), TEXT, sequence_length=LENGTH)
    assert list(result["stages"]) == ["float", "rounded", "packed"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hf_lowbit.report(model).layers


def test_nothing_is_kept_outside() -> None:
    weights = quantize_for_stages(tiny_llama(), hf_lowbit.RTNConfig(bits=3, group_size=8))
    names = set(weights)
    hf_lowbit.quantize(tiny_llama(1), hf_lowbit.RTNConfig(bits=3, group_size=8, quantize_embeddings=True))
    assert set(weights) == names and "model.layers.1.mlp.down_proj.weight" in names


def test_refusals_come_before_any_forward_pass() -> None:
    reference, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    model = copy.deepcopy(reference)
    weights = quantize_for_stages(model, hf_lowbit.RTNConfig(bits=3, group_size=8))
    for source in (model, reference):
        source.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was made"))
    with pytest.raises(QuantizationError, match="not quantized"):
        evaluate_stages(reference, reference, tokenizer, TEXT)
    with pytest.raises(ValueError, match="too short"):
        evaluate_stages(model, reference, tokenizer, "a few words")
    name = next(iter(weights))
    for wrong in ({}, {**weights, "other.weight": weights[name]}, {**weights, name: weights[name][:-1]}):
        with pytest.raises(QuantizationError, match="are not this model's"):
            evaluate_stages(model, reference, tokenizer, TEXT, weights=wrong, sequence_length=LENGTH)
