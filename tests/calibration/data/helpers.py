"""Short calls of `prepare_data`, and a tiny model of speech with its processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from hf_lowbit.calibration.data import CalibrationData, prepare_data
from tests.evaluation.tiny import tiny_llama, tiny_tokenizer

# Long enough for ten windows of 16 tokens, and no two windows are alike.
TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs please and wait"] * 2
IDS = torch.arange(200).reshape(10, 20) % 29


def with_eos(bos: bool = True) -> Any:
    """The tokenizer with "z" as its EOS token."""
    tokenizer = tiny_tokenizer(bos)
    tokenizer.eos_token = "z"
    return tokenizer


def no_tokenizer() -> NoReturn:
    """A tokenizer source for data that must not ask for one."""
    raise AssertionError("the tokenizer was loaded without need")


def prepare(data: Any, model: Any = None, tokenizer_source: Any = tiny_tokenizer, **options: Any) -> CalibrationData:
    """`prepare_data` with small numbers and a tiny Llama."""
    numbers = {"num_samples": 4, "sequence_length": 16, "seed": 0, **options}
    return prepare_data(data, tiny_llama() if model is None else model, tokenizer_source, **numbers)


def rows(data: CalibrationData) -> list[list[int]]:
    """The token ids of all samples."""
    return [row for batch in data.batches for row in batch["input_ids"].tolist()]


def tiny_whisper() -> WhisperForConditionalGeneration:
    """A random Whisper for recordings of a second, in training mode with dropout."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    # The tokenizer's <s> begins a transcript, and "z" ends it.
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 27, "decoder_start_token_id": 0}
    shape = {"vocab_size": 29, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 24}
    config = WhisperConfig(**sizes, **heads, **ends, **shape, dropout=0.5, init_std=0.5, suppress_tokens=None)
    return WhisperForConditionalGeneration(config).train()


def tiny_processor(mel_bins: int = 16) -> Any:
    """A feature extractor and a tokenizer in one object, as a WhisperProcessor has them."""
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=1)
    return SimpleNamespace(feature_extractor=extractor, tokenizer=tiny_tokenizer())
