"""The evaluation of real models, on the testbed's text and recordings."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor

from hf_lowbit.evaluation import evaluate_language_model, evaluate_speech_model
from hf_lowbit.testbed import smollm2, speech, two_cities_transcript, validation_text, whisper_tiny_en

pytestmark = pytest.mark.real


def test_smollm2_reads_english() -> None:
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = evaluate_language_model(model, tokenizer, validation_text(), sequence_length=256, max_tokens=1024)
    assert 10 < result["perplexity"] < 50
    assert result["intervals"]["perplexity"][0] < result["perplexity"] < result["intervals"]["perplexity"][1]


def test_whisper_hears_dickens() -> None:
    folder = whisper_tiny_en()
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(folder)
    recordings = [path for path in speech() if path.stem == "two_cities"]
    known = evaluate_speech_model(model, processor, recordings, transcripts=[two_cities_transcript()])
    assert known["wer"] < 0.05
    own = evaluate_speech_model(model, processor, speech()[:1], reference=model)
    assert (own["wer"], own["against"]) == (0.0, "reference")
    assert "fail better" in own["hypotheses"][0].lower()
