"""Transcripts of recordings by a Whisper model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_lowbit.evaluation.audio import SAMPLE_RATE, Waveform, split_speech
from hf_lowbit.evaluation.logits import evaluation_mode

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor


def transcribe(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    waveform: Waveform,
    *,
    language: str | None = None,
) -> str:
    """Transcribe a recording greedily, window by window of at most 30 seconds.

    Longer recordings are cut at quiet moments (`split_speech`); the windows do not see each other's text, so that one
    window's error does not spread.

    Args:
        waveform: float32 [samples], 16 kHz mono (`read_wav`).
        language: for a multilingual model; None lets it detect the language.

    Raises:
        ValueError: the recording is empty.
    """
    windows = split_speech(waveform)
    return " ".join(_transcribe_window(model, processor, window, language) for window in windows)


def _transcribe_window(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, window: Waveform, language: str | None
) -> str:
    inputs = processor(window, sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True)
    options: dict[str, Any] = {} if language is None else {"language": language, "task": "transcribe"}
    with evaluation_mode(model):
        ids = model.generate(
            inputs.input_features.to(model.device, model.dtype),
            attention_mask=inputs.attention_mask.to(model.device),
            do_sample=False,
            num_beams=1,
            **options,
        )
    (text,) = processor.batch_decode(ids, skip_special_tokens=True)
    return str(text).strip()
