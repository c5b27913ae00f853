"""The evaluation of a speech recognition model, as one JSON-ready dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.evaluation.audio import read_wav
from hf_lowbit.evaluation.transcription import transcribe
from hf_lowbit.evaluation.wer import word_error_rate

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor


def evaluate_speech_model(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    recordings: Sequence[str | Path],
    *,
    transcripts: Sequence[str] | None = None,
    reference: WhisperForConditionalGeneration | None = None,
    language: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Word error rate on WAV files, against known transcripts or against what a reference model hears.

    Args:
        transcripts: one for each recording.
        reference: transcribes the recordings where no transcripts are given.

    Returns:
        What `word_error_rate` returns, with "against" ("transcripts" or "reference") and "hypotheses", the model's
        transcripts in the order of the recordings.

    Raises:
        ValueError: neither or both of transcripts and reference, no recording, another number of transcripts, or a
            reference that hears nothing.
        ImportError: jiwer is absent.
    """
    if (transcripts is None) == (reference is None):
        raise ValueError("give either transcripts or a reference model")
    if not recordings or (transcripts is not None and len(transcripts) != len(recordings)):
        raise ValueError(f"{len(recordings)} recordings and {len(transcripts or ())} transcripts")
    waveforms = [read_wav(path) for path in recordings]
    expected = list(transcripts or ())
    if reference is not None:
        expected = [transcribe(reference, processor, waveform, language=language) for waveform in waveforms]
    hypotheses = [transcribe(model, processor, waveform, language=language) for waveform in waveforms]
    against = "reference" if transcripts is None else "transcripts"
    return {**word_error_rate(expected, hypotheses, seed=seed), "against": against, "hypotheses": hypotheses}
