"""Quality of a model: perplexity, divergence from a reference, word error rate, each with a bootstrap interval.

Also at the stages of quantization, tasks of lm-eval, and pictures.
"""

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
    from hf_lowbit.evaluation.plots import draw_layer_errors, draw_quality
    from hf_lowbit.evaluation.points import Point, points_of, read_points
    from hf_lowbit.evaluation.speech import evaluate_speech_model
    from hf_lowbit.evaluation.stages import evaluate_stages, quantize_for_stages
    from hf_lowbit.evaluation.tasks import load_tasks, run_tasks
    from hf_lowbit.evaluation.transcription import transcribe
    from hf_lowbit.evaluation.wer import normalize_transcript, word_error_rate
    from hf_lowbit.evaluation.windows import split_windows, tokenize

_LAZY = {
    "Point": "points",
    "bootstrap_interval": "bootstrap",
    "draw_layer_errors": "plots",
    "draw_quality": "plots",
    "evaluate_language_model": "language",
    "evaluate_speech_model": "speech",
    "evaluate_stages": "stages",
    "kl_divergence": "divergence",
    "load_tasks": "tasks",
    "measure_divergence": "measure",
    "negative_log_likelihood": "perplexity",
    "normalize_transcript": "wer",
    "measure_perplexity": "measure",
    "points_of": "points",
    "quantize_for_stages": "stages",
    "read_points": "points",
    "read_wav": "audio",
    "run_tasks": "tasks",
    "split_speech": "audio",
    "split_windows": "windows",
    "tokenize": "windows",
    "top1_agreement": "divergence",
    "transcribe": "transcription",
    "word_error_rate": "wer",
}

__all__ = [
    "Point",
    "bootstrap_interval",
    "draw_layer_errors",
    "draw_quality",
    "evaluate_language_model",
    "evaluate_speech_model",
    "evaluate_stages",
    "kl_divergence",
    "load_tasks",
    "measure_divergence",
    "measure_perplexity",
    "negative_log_likelihood",
    "normalize_transcript",
    "points_of",
    "quantize_for_stages",
    "read_points",
    "read_wav",
    "run_tasks",
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
