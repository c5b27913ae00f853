"""Calibration and held-out windows of a model's tokens, the same for every variant."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def prepare(model: Path, folder: Path, samples: int, length: int, tokens: int, seed: int) -> tuple[Path, list[Tensor]]:
    """Token ids ``[samples, length]`` to calibrate on, saved as a file, and held-out windows of 512 tokens."""
    from transformers import AutoTokenizer

    from hf_lowbit.evaluation.windows import split_windows, tokenize
    from hf_lowbit.testbed import calibration_text, validation_text

    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = tokenizer.bos_token_id
    ids = split_windows(tokenize(tokenizer, calibration_text()), length, bos)
    whole = [window for window in ids if window.numel() == length]
    if len(whole) < samples:
        raise SystemExit(f"the calibration text holds {len(whole)} windows of {length} tokens, not {samples}")
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    path = folder / "calibration.pt"
    torch.save(torch.stack([whole[i] for i in chosen.tolist()]), path)
    return path, split_windows(tokenize(tokenizer, validation_text(), tokens), 512, bos)
