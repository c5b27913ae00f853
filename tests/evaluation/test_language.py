"""The evaluation of a language model: its keys, its windows, and what it refuses before any work."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from hf_lowbit.evaluation import (
    evaluate_language_model,
    measure_divergence,
    measure_perplexity,
    split_windows,
    tokenize,
)
from hf_lowbit.evaluation.language import summarize
from hf_lowbit.evaluation.scores import WindowScores
from tests.evaluation.tiny import TEXT, VOCABULARY, tiny_llama, tiny_tokenizer


def test_result_without_a_reference() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    result = evaluate_language_model(model, tokenizer, TEXT, sequence_length=32)

    windows = split_windows(tokenize(tokenizer, TEXT), 32, tokenizer.bos_token_id)
    assert result["perplexity"] == pytest.approx(measure_perplexity(model, windows))
    low, high = result["intervals"]["perplexity"]
    assert low < result["perplexity"] < high
    assert set(result) == {"perplexity", "intervals", "tokens", "windows", "sequence_length", "bos"}
    assert (result["tokens"], result["windows"], result["sequence_length"]) == (len(TEXT), len(windows), 32)
    assert json.loads(json.dumps(result)) == result


def test_result_with_a_reference() -> None:
    model, reference, tokenizer = tiny_llama(0), tiny_llama(1), tiny_tokenizer()
    result = evaluate_language_model(model, tokenizer, TEXT, reference=reference, sequence_length=32)

    windows = split_windows(tokenize(tokenizer, TEXT), 32, tokenizer.bos_token_id)
    assert (result["kl"], result["top1_agreement"]) == pytest.approx(measure_divergence(model, reference, windows))
    assert result["reference_perplexity"] == pytest.approx(measure_perplexity(reference, windows))
    for name in ("perplexity", "kl", "top1_agreement"):
        low, high = result["intervals"][name]
        assert low <= result[name] <= high


def test_a_model_is_its_own_reference() -> None:
    model = tiny_llama()
    result = evaluate_language_model(model, tiny_tokenizer(), TEXT, reference=model, sequence_length=32)
    assert (result["kl"], result["top1_agreement"]) == (0.0, 1.0)
    assert result["intervals"]["kl"] == [0.0, 0.0]
    assert result["reference_perplexity"] == result["perplexity"]


@pytest.mark.parametrize("bos", [True, False])
def test_bos_begins_each_window_if_the_tokenizer_has_one(bos: bool) -> None:
    model, seen = tiny_llama(), []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"][0]), with_kwargs=True)
    result = evaluate_language_model(model, tiny_tokenizer(bos), TEXT, sequence_length=16)
    assert result["bos"] is bos
    assert all((ids[0] == 0) == bos and not (ids[1:] == 0).any() for ids in seen)
    assert all(ids.numel() == 16 for ids in seen[:-1])
    assert result["tokens"] == sum(ids.numel() - 1 for ids in seen)


def test_max_tokens_limits_the_text() -> None:
    result = evaluate_language_model(tiny_llama(), tiny_tokenizer(), TEXT, sequence_length=11, max_tokens=40)
    assert (result["tokens"], result["windows"]) == (40, 4)
    everything = evaluate_language_model(tiny_llama(), tiny_tokenizer(), TEXT, sequence_length=11, max_tokens=None)
    assert everything["tokens"] == len(TEXT)


def test_the_seed_changes_the_intervals_only() -> None:
    runs = [evaluate_language_model(tiny_llama(), tiny_tokenizer(), TEXT, sequence_length=8, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0]["perplexity"] == runs[2]["perplexity"]


def test_a_window_of_few_tokens_does_not_decide_the_interval() -> None:
    scores = WindowScores(tokens=[100, 100, 1], sums={"negative_log_likelihood": [200.0, 220.0, 30.0]})
    low, high = summarize(scores)["intervals"]["perplexity"]
    assert low == pytest.approx(math.exp(2.0))
    assert high == pytest.approx(math.exp(250 / 101))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "it has 0 tokens"),
        ("a few words", {}, "too short.* 11 tokens"),
        (TEXT[:40], {"sequence_length": 33}, "one and a half windows of 33"),
        (TEXT, {"sequence_length": 1}, "sequence_length is 1"),
        (TEXT, {"reference": tiny_llama(vocabulary=VOCABULARY + 1)}, "the reference has a vocabulary of"),
    ],
)
def test_refusals_come_before_any_forward_pass(text: str, options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    for source in (model, options.get("reference", model)):
        source.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was made"))
    with pytest.raises(ValueError, match=message):
        evaluate_language_model(model, tiny_tokenizer(), text, **options)


def test_a_larger_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCABULARY} tokens and the model {VOCABULARY - 1}"):
        evaluate_language_model(tiny_llama(vocabulary=VOCABULARY - 1), tiny_tokenizer(), TEXT)


def test_a_broken_model_is_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="window 0: the model"):
        evaluate_language_model(model, tiny_tokenizer(), TEXT, sequence_length=32)
