"""Compiled decoding inside transformers' `generate`: the same tokens as eager ones, siblings joined in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.kernels import joining, one_query

PROMPT = torch.arange(5)[None]
ARGUMENTS = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def load(checkpoint: Path, bits: int = 4) -> LlamaForCausalLM:
    packed: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        checkpoint, quantization_config=hf_lowbit.RTNConfig(bits=bits, group_size=32, quantize_lm_head=True)
    )
    return packed


def test_generates_what_eager_layers_do(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(checkpoint)
    joined: list[int] = []
    summed: list[object] = []
    join, replace = joining._join, one_query._replace
    monkeypatch.setattr(joining, "_join", lambda graph, calls: (joined.append(len(calls)), join(graph, calls)))
    monkeypatch.setattr(one_query, "_replace", lambda graph, node: (summed.append(node), replace(graph, node)))
    monkeypatch.setattr(joining.JoinProducts, "uuid", lambda self: None)  # graphs in inductor's cache are not traced
    expected = model.generate(PROMPT, **ARGUMENTS)
    config = hf_lowbit.compile_config()
    result = model.generate(PROMPT, cache_implementation="static", compile_config=config, **ARGUMENTS)
    assert torch.equal(result, expected)
    assert sorted(joined) == [2, 3]
    assert len(summed) == 1


@pytest.mark.parametrize("is_told_the_model", [False, True])
def test_graphs_of_modules_that_stay_are_their_own(checkpoint: Path, is_told_the_model: bool) -> None:
    """Of two models in a process, which what is still looked at does not tell apart."""
    models = [load(checkpoint, bits) for bits in (4, 3)]
    for model in models * 2:
        expected = model.generate(PROMPT, **ARGUMENTS)
        assert torch.equal(model.generate(PROMPT, **staying(model, is_told_the_model), **ARGUMENTS), expected)


@pytest.mark.parametrize("is_told_the_model", [False, True])
def test_other_calls_of_modules_that_stay_are_noticed(checkpoint: Path, is_told_the_model: bool) -> None:
    model = load(checkpoint)
    arguments = staying(model, is_told_the_model)
    for prompt, tokens in ((PROMPT, 6), (PROMPT.repeat(2, 1), 6), (PROMPT, 9), (PROMPT, 6)):  # another cache each time
        given = {**ARGUMENTS, "attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens}
        assert torch.equal(model.generate(prompt, **arguments, **given), model.generate(prompt, **given))


@pytest.mark.parametrize("is_told_the_model", [False, True])
def test_modules_that_stay_have_adapters_and_sample(checkpoint: Path, is_told_the_model: bool) -> None:
    """An adapter that is there before the first step is in the graph."""
    peft = pytest.importorskip("peft")
    base = load(checkpoint)
    without = base.generate(PROMPT, **ARGUMENTS)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
    model = peft.get_peft_model(base, config).eval()
    expected = model.generate(input_ids=PROMPT, **ARGUMENTS)
    assert not torch.equal(expected, without)
    arguments = staying(base, is_told_the_model)
    assert torch.equal(model.generate(input_ids=PROMPT, **arguments, **ARGUMENTS), expected)
    sampled = []
    for given in ({}, arguments):
        torch.manual_seed(2)
        sampled.append(model.generate(input_ids=PROMPT, **given, **{**ARGUMENTS, "do_sample": True}))
    assert torch.equal(*sampled)


def staying(model: LlamaForCausalLM, is_told_the_model: bool) -> dict[str, Any]:
    config = hf_lowbit.compile_config(modules_stay=model if is_told_the_model else True)
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("modules_stay", [False, True])
def test_equal_configs_compile_once(modules_stay: bool) -> None:
    assert hf_lowbit.compile_config(modules_stay) == hf_lowbit.compile_config(modules_stay)
