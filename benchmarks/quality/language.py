"""Causal language models: calibration and held-out windows of prose."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quality.task import Task


def prepare(options: argparse.Namespace, folder: Path) -> Task:
    """``samples`` windows of ``length`` tokens to calibrate on, and held-out windows of 512, ``tokens`` in all."""
    from transformers import AutoTokenizer

    from hf_lowbit.evaluation.windows import split_windows, tokenize
    from hf_lowbit.testbed import calibration_text, smollm2, validation_text

    model = options.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token_id
    text = tokenize(tokenizer, calibration_text())
    whole = _whole(split_windows(text, options.length, bos), options.length)
    if len(whole) < options.samples:  # then windows of the halves of others, too
        whole += _whole(split_windows(text[options.length // 2 :], options.length, bos), options.length)
    if len(whole) < options.samples:
        raise SystemExit(
            f"the calibration text holds {len(whole)} windows of {options.length} tokens, not {options.samples}"
        )
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(options.seed))[: options.samples]
    path = folder / "calibration.pt"
    torch.save(torch.stack([whole[i] for i in chosen.sort().values.tolist()]), path)
    windows = split_windows(tokenize(tokenizer, validation_text(), options.tokens), 512, bos)
    return Task(model, path, windows, _load, _read)


def _whole(windows: list[Tensor], length: int) -> list[Tensor]:
    return [window for window in windows if window.numel() == length]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _read(model: Any) -> Callable[[Tensor], Tensor]:
    def read(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits

    return read
