"""A tiny Llama trained by transformers' Trainer: what the tests of training share."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import hf_lowbit

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def data(count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards from anywhere: learnt in a few steps."""
    return [{"input_ids": ids, "labels": ids} for ids in (torch.arange(16) + 3 * i for i in range(count))]


def adapted(model: Any, **fields: Any) -> Any:
    """The model, prepared, with a new adapter."""
    model = hf_lowbit.prepare_for_training(model, gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(**{**LORA, **fields}))


def trainer(model: Any, folder: Path, steps: int = 10, **arguments: Any) -> Trainer:
    """A Trainer on the CPU that logs every step and keeps no checkpoints."""
    values: dict[str, Any] = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(str(folder), **{**values, **arguments}), train_dataset=data())


def train(trainer: Any, **arguments: Any) -> list[float]:
    """Train, and the loss of every step."""
    trainer.train(**arguments)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
