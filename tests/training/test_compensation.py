"""A compensation adapter as the beginning of fine-tuning: one line, and a reload finds what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import hf_lowbit
from hf_lowbit import LowRankConfig
from tests.integrations.tiny_peft import load, lora_parameters, packed_bytes, quantized, run
from tests.training.tiny import train, trainer

ADAPTER = "lowbit"


def compensated(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return quantized("llama", dtype, **{"bits": 2, "low_rank": LowRankConfig(4, keep="adapter"), **fields})


def prepared(model: Any) -> Any:
    return hf_lowbit.prepare_for_training(model, gradient_checkpointing=False, train_compensation=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trained_compensation_is_what_a_reload_computes_with(dtype: torch.dtype, tmp_path: Path) -> None:
    base = compensated(dtype)
    before, codes = run("llama", base), packed_bytes(base)
    model = prepared(base)
    assert isinstance(model, PeftModel) and torch.allclose(run("llama", model).float(), before.float(), atol=0.02)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in lora_parameters(model, ADAPTER)} and len(trained) == 28
    losses = train(trainer(model, tmp_path / "run"))
    assert losses[-1] < losses[0] - 0.4 and packed_bytes(model) == codes
    expected = run("llama", model)

    model.get_base_model().save_pretrained(tmp_path / "model")
    again = load("llama", tmp_path / "model", dtype)
    assert torch.equal(run("llama", again), expected) and packed_bytes(again) == codes
    continued = train(trainer(prepared(again), tmp_path / "run", steps=2))
    assert continued[0] < losses[0] - 0.4


def test_the_trained_adapter_alone_replaces_the_compensation(tmp_path: Path) -> None:
    model = prepared(compensated())
    train(trainer(model, tmp_path / "run", steps=4))
    model.save_pretrained(tmp_path / "adapter")
    for name in (ADAPTER, "default"):
        again = PeftModel.from_pretrained(compensated(), tmp_path / "adapter" / ADAPTER, adapter_name=name)
        assert torch.allclose(run("llama", again), run("llama", model), atol=1e-5)


def test_checkpoints_hold_the_adapter_and_are_resumed_from(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 2}
    whole = prepared(compensated())
    losses = train(trainer(whole, tmp_path / "whole", steps=4, **arguments))
    resumed = prepared(compensated())
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    continued = train(trainer(resumed, tmp_path / "rest", steps=4, **arguments), resume_from_checkpoint=checkpoint)
    assert continued[-1] == pytest.approx(losses[-1], abs=1e-4)
    assert torch.allclose(run("llama", resumed), run("llama", whole), atol=1e-4)


def test_a_second_adapter_leaves_the_compensation_frozen_and_is_resumed(tmp_path: Path) -> None:
    model = hf_lowbit.prepare_for_training(compensated(), gradient_checkpointing=False)
    repair = {name: parameter.detach().clone() for name, parameter in lora_parameters(model, ADAPTER)}
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    train(trainer(model, tmp_path / "run", steps=4, save_strategy="steps", save_steps=2))
    kept = {name.removeprefix("base_model.model."): p for name, p in lora_parameters(model, ADAPTER)}
    assert repair and all(torch.equal(kept[name], value) for name, value in repair.items())
    expected = run("llama", model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(compensated(), tmp_path / "adapter")
    assert torch.equal(run("llama", again), expected)
    model = get_peft_model(
        hf_lowbit.prepare_for_training(compensated(), gradient_checkpointing=False),
        LoraConfig(r=2, target_modules="all-linear"),
    )
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    train(trainer(model, tmp_path / "rest", steps=4), resume_from_checkpoint=checkpoint)
    assert torch.allclose(run("llama", model), expected, atol=1e-4)


def test_what_cannot_be_trained_says_why() -> None:
    with pytest.raises(ValueError, match='keep="adapter"'):
        prepared(quantized("llama"))
    model = get_peft_model(compensated(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="remove default first"):
        prepared(model)


def test_in_diffusers_it_is_trained_in_place(tmp_path: Path) -> None:
    low_rank = LowRankConfig(2, keep="adapter")
    model = prepared(quantized("conditional_unet", bits=2, low_rank=low_rank))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for _, p in lora_parameters(model, ADAPTER)} and trained
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    before = run("conditional_unet", model)
    text, target = torch.randn(1, 7, 32), torch.randn(1, 4, 16, 16)
    (model(target, 3, text).sample - target).square().mean().backward()
    optimizer.step()
    expected = run("conditional_unet", model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(run("conditional_unet", load("conditional_unet", tmp_path)), expected)
