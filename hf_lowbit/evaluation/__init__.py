"""Quality of a model: perplexity, divergence from a reference, word error rate, each with a bootstrap interval."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowbit.evaluation.audio import read_wav, split_speech
    from hf_lowbit.evaluation.bootstrap import bootstrap_interval
    from hf_lowbit.evaluation.divergence import kl_divergence, top1_agreement
    from hf_lowbit.evaluation.language import evaluate_language_model
    from hf_lowbit.evaluation.measure import measure_divergence, measure_perplexity
    from hf_lowbit.evaluation.perplexity import negative_log_likelihood
    from hf_lowbit.evaluation.speech import evaluate_speech_model
    from hf_lowbit.evaluation.transcription import transcribe
    from hf_lowbit.evaluation.wer import normalize_transcript, word_error_rate
    from hf_lowbit.evaluation.windows import split_windows, tokenize

_LAZY = {
    "bootstrap_interval": "bootstrap",
    "evaluate_language_model": "language",
    "evaluate_speech_model": "speech",
    "kl_divergence": "divergence",
    "measure_divergence": "measure",
    "negative_log_likelihood": "perplexity",
    "normalize_transcript": "wer",
    "measure_perplexity": "measure",
    "read_wav": "audio",
    "split_speech": "audio",
    "split_windows": "windows",
    "tokenize": "windows",
    "top1_agreement": "divergence",
    "transcribe": "transcription",
    "word_error_rate": "wer",
}

__all__ = [
    "bootstrap_interval",
    "evaluate_language_model",
    "evaluate_speech_model",
    "kl_divergence",
    "measure_divergence",
    "measure_perplexity",
    "negative_log_likelihood",
    "normalize_transcript",
    "read_wav",
    "split_speech",
    "split_windows",
    "tokenize",
    "top1_agreement",
    "transcribe",
    "word_error_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
