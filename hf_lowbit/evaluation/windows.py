"""Tokenized text, cut into windows that are evaluated independently of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None) -> list[int]:
    """Token ids of the text without special tokens, at most the first ``max_tokens`` of them."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:max_tokens]


def split_windows(token_ids: Sequence[int], sequence_length: int, bos_token_id: int | None = None) -> list[Tensor]:
    """Cut token ids into non-overlapping windows of ``sequence_length`` tokens.

    Each window begins with the BOS token, if there is one, which counts towards its length. A shorter last window is
    kept if it has at least two tokens, so that it predicts one. A window of n tokens predicts n - 1; every statistic
    is a mean over predicted tokens, so that the last window weighs what it holds.

    Returns:
        int64 tensors of shape [n], 2 <= n <= ``sequence_length``; none if there are too few tokens.

    Raises:
        ValueError: ``sequence_length`` is less than 2.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; a window predicts nothing below 2 tokens")
    prefix = [] if bos_token_id is None else [bos_token_id]
    step = sequence_length - len(prefix)
    windows = (prefix + list(token_ids[start : start + step]) for start in range(0, len(token_ids), step))
    return [torch.tensor(window, dtype=torch.int64) for window in windows if len(window) >= 2]


def predicted_tokens(windows: Sequence[Tensor]) -> list[int]:
    """How many tokens each window predicts: its weight."""
    return [window.numel() - 1 for window in windows]
