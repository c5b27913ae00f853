"""transformers' Trainer and TRL's SFTTrainer with LoRA on packed models of every number format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import Trainer

import hf_lowbit
from tests.integrations.tiny_peft import packed_bytes, quantized, run
from tests.training.formats import FORMATS
from tests.training.tiny import adapted, data, train, trainer

every_format = pytest.mark.parametrize("fields", FORMATS.values(), ids=list(FORMATS))


@every_format
def test_training_lowers_the_loss_and_its_adapter_comes_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(quantized("llama", **fields))
    codes = packed_bytes(model)
    losses = train(trainer(model, tmp_path))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.4
    assert packed_bytes(model) == codes
    expected = run("llama", model)
    model.save_pretrained(tmp_path / "adapter")

    again = hf_lowbit.prepare_for_training(quantized("llama", **fields), gradient_checkpointing=False)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(run("llama", again), expected)
    continued = train(trainer(again, tmp_path, steps=4, learning_rate=1e-3))
    assert continued[0] < losses[0] - 0.4 and continued[-1] < continued[0]


@pytest.mark.parametrize("name", ["int4", pytest.param("branch", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_where_an_unbroken_one_does(name: str, tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = adapted(quantized("llama", **FORMATS[name]))
    losses = train(trainer(whole, tmp_path / "whole", steps=6, **arguments))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not list(checkpoint.glob("model*.safetensors"))  # the adapter alone
    torch.manual_seed(1)  # another beginning, which the checkpoint replaces
    resumed = adapted(quantized("llama", **FORMATS[name]))
    continued = train(trainer(resumed, tmp_path / "resumed", 6, **arguments), resume_from_checkpoint=str(checkpoint))
    assert continued[-1] == pytest.approx(losses[-1], abs=1e-4)
    assert torch.allclose(run("llama", resumed), run("llama", whole), atol=1e-4)


def gradient_norms(model: Any, folder: Path, **arguments: Any) -> list[float]:
    running = trainer(model, folder, steps=3, learning_rate=1e-3, **arguments)
    train(running)
    return [entry["grad_norm"] for entry in running.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("name", ["int3", "nf4", "branch", "int8 inputs"])
def test_checkpointing_and_accumulation_change_no_gradient(name: str, tmp_path: Path) -> None:
    def norms(**arguments: Any) -> list[float]:
        torch.manual_seed(2)
        return gradient_norms(adapted(quantized("llama", **FORMATS[name])), tmp_path, **arguments)

    plain = norms()
    for reentrant in (False, True):
        kwargs = {"use_reentrant": reentrant}
        assert norms(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs) == pytest.approx(
            plain, rel=1e-4
        )
    accumulated = norms(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert accumulated == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("fields", [
    pytest.param(fields, id=name, marks=() if name in ("int4", "fp8", "branch", "int8 inputs") else pytest.mark.slow)
    for name, fields in FORMATS.items()
])  # fmt: skip
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16 weights"])
def test_bfloat16(weights: torch.dtype, fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(quantized("llama", weights, **fields))
    losses = train(trainer(model, tmp_path, bf16=weights == torch.float32, gradient_checkpointing=True))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.4
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and {parameter.dtype for parameter in trained} == {torch.float32}


def test_a_fully_packed_model_trains(tmp_path: Path) -> None:
    """Embedding and head packed as well, and an adapter on the head."""
    fields = {"quantize_embeddings": True, "quantize_lm_head": True}
    model = adapted(quantized("llama", **fields), target_modules=["q_proj", "down_proj", "lm_head"])
    losses = train(trainer(model, tmp_path, gradient_checkpointing=True))
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("name", ["int2", "nf4", "int8 inputs"])
def test_sft_trainer(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data(16)])
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, save_strategy="no", logging_steps=1, gradient_checkpointing=True,
        lr_scheduler_type="constant", dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    model = quantized("llama", **FORMATS[name])
    codes = packed_bytes(model)
    tokenizer = _tokenizer()
    running: Trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    losses = train(running)
    assert losses[-1] < losses[0] - 0.2 and packed_bytes(running.model) == codes
    running.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized("llama", **FORMATS[name]), tmp_path / "adapter")
    assert torch.equal(run("llama", again), run("llama", running.model))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
