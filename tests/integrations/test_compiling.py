"""Compiled decoding inside transformers' `generate`: the same tokens as eager ones, siblings joined in the graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.kernels import joining


@pytest.fixture
def model(tmp_path: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    packed: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=hf_lowbit.RTNConfig(bits=4, group_size=32, quantize_lm_head=True)
    )
    return packed


def test_generates_what_eager_layers_do(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    join = joining._join
    monkeypatch.setattr(joining, "_join", lambda graph, calls: (joined.append(len(calls)), join(graph, calls)))
    monkeypatch.setattr(joining.JoinProducts, "uuid", lambda self: None)  # graphs in inductor's cache are not traced
    prompt = torch.arange(5)[None]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **arguments)
    config = hf_lowbit.compile_config()
    result = model.generate(prompt, cache_implementation="static", compile_config=config, **arguments)
    assert torch.equal(result, expected)
    assert sorted(joined) == [2, 3]


def test_equal_configs_compile_once() -> None:
    assert hf_lowbit.compile_config() == hf_lowbit.compile_config()
