"""Measuring a model that is named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_lowbit.cli.errors import RequestError
from hf_lowbit.cli.progress import windows
from hf_lowbit.cli.run import load
from hf_lowbit.cli.sources import read_texts, recordings


def measure_language(
    model: str, reference: str | None, data: Path | None, sequence_length: int, max_tokens: int, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The loaded model, and its perplexity and, with a reference, KL and top-1 agreement."""
    text, name = evaluation_text(data)
    from transformers import AutoTokenizer

    from hf_lowbit.evaluation import evaluate_language_model

    tokenizer = AutoTokenizer.from_pretrained(model)
    measured = in_float32(load(model, "loading the model"))
    if not hasattr(measured, "get_output_embeddings") or measured.get_output_embeddings() is None:
        raise RequestError(f"{model} is a {type(measured).__name__}: perplexity needs a causal language model")
    compared = None if reference is None else in_float32(load(reference, "loading the reference"))
    options: dict[str, Any] = {"sequence_length": sequence_length, "max_tokens": max_tokens, "seed": seed}
    with windows(measured, "measuring"):
        values = evaluate_language_model(measured, tokenizer, text, reference=compared, **options)
    return measured, {**values, "max_tokens": max_tokens, "dtype": "float32", "data": name}


def in_float32(model: Any) -> Any:
    """A model that computes in float32, in which a comparison shows the weights' differences and no other rounding.

    Packed weights stay as they are. On CPUs it is also several times faster than bfloat16.
    """
    import torch
    from torch import nn

    return nn.Module.to(model, torch.float32)


def evaluation_text(data: Path | None) -> tuple[str, str]:
    """Text to measure on, and its name; by default the excerpt that is shipped."""
    if data is not None:
        return "\n\n".join(read_texts(data)), data.name
    from hf_lowbit.testbed import validation_text

    return validation_text(), "the validation text shipped with hf_lowbit"


def measure_speech(
    model: str, reference: str | None, data: Path | None, transcripts: Path | None, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The loaded model, and its word error rate against transcripts, or against what the reference hears."""
    if data is None:
        raise RequestError("a speech model is measured on recordings: add --data with a WAV file or a folder of them")
    if (reference is None) == (transcripts is None):
        raise RequestError("the word error rate needs either --reference MODEL or --transcripts FILE")
    files = recordings(data)
    lines = None if transcripts is None else _lines(transcripts, len(files))
    from transformers import AutoProcessor

    from hf_lowbit.evaluation import evaluate_speech_model

    processor = AutoProcessor.from_pretrained(model)
    measured = in_float32(load(model, "loading the model"))
    compared = None if reference is None else in_float32(load(reference, "loading the reference"))
    values = evaluate_speech_model(measured, processor, files, transcripts=lines, reference=compared, seed=seed)
    return measured, {**values, "recordings": [file.name for file in files], "dtype": "float32", "data": data.name}


def _lines(path: Path, expected: int) -> list[str]:
    if not path.is_file():
        raise RequestError(f"there is no file {str(path)!r}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != expected:
        raise RequestError(f"{path} has {len(lines)} lines for {expected} recordings; one line for each is needed")
    return lines
