"""Whisper-tiny.en on three recordings: 8 bits transcribe what the float model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

import hf_lowbit
from hf_lowbit.evaluation import evaluate_speech_model
from hf_lowbit.testbed import speech, whisper_tiny_en

pytestmark = pytest.mark.real


def _load(**arguments: Any) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(whisper_tiny_en(), dtype=torch.float32, **arguments)


@pytest.fixture(scope="module")
def evaluate() -> Any:
    """bits -> word error rate against the float model's transcripts."""
    processor, reference = WhisperProcessor.from_pretrained(whisper_tiny_en()), _load()

    def run(bits: int, group_size: int | None) -> dict[str, Any]:
        model = _load(quantization_config=hf_lowbit.RTNConfig(bits=bits, group_size=group_size))
        assert hf_lowbit.report(model).bits_per_weight < bits + 0.5
        return evaluate_speech_model(model, processor, speech(), reference=reference)

    return run


def test_eight_bits_transcribe_the_same(evaluate: Any) -> None:
    assert evaluate(8, None)["wer"] == 0.0


def test_four_bits_report_their_errors(evaluate: Any) -> None:
    """The bound is loose: 4-bit round to nearest on so small a model is expected to make mistakes."""
    result = evaluate(4, 64)
    print(f"4 bits, groups of 64: word error rate {result['wer']:.3f} against the float transcripts")
    assert 0.0 <= result["wer"] < 0.5
