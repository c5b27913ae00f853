"""A row's quality and size."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.evaluation import bootstrap_interval
from hf_lowbit.evaluation.language import summarize
from hf_lowbit.evaluation.scores import WindowScores, score_windows
from mambas.logits import held_out, in_one_pass, state_bytes, token_by_token
from mambas.models import calibration, load
from mambas.rows import REFERENCE, SOME, Row, all_rows
from mambas.settings import TRAINED, Settings, generation_of


class Quality:
    """Measures the rows of one model; what the float one predicts is computed once, when the first row needs it."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._windows = settings, held_out(settings)
        self._reference: Tensor | None = None

    def measure(self, row: Row) -> dict[str, Any]:
        """The facts of one row, or where and why there are none."""
        stage = "load"
        try:
            facts, model = self._load(row)
            windows = self._windows[: SOME if row.slow else None]
            stage = "prefill"
            facts |= self._in_one_pass(model, windows)
            stage = "decode"
            facts["state_bytes"] = state_bytes(model, windows)
            facts["decode"] = self._token_by_token(model, windows)
            stage = "save"
            facts["checkpoint_bytes"] = checkpoint_bytes(model)
        except Exception as error:  # a row that cannot is a result, too
            failed = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}", "stage": stage}
            return {**facts, **failed} if stage == "save" else failed
        return facts

    def _load(self, row: Row) -> tuple[dict[str, Any], Any]:
        started = time.monotonic()
        model = load(row, TRAINED[self._settings.model], calibration(self._settings))
        facts: dict[str, Any] = {"load_seconds": time.monotonic() - started}
        if row.method != "float" and not row.is_peer:
            import hf_lowbit

            report = hf_lowbit.report(model)
            facts |= {
                "bits_per_weight": report.bits_per_weight,
                "arithmetic": sorted({layer.arithmetic for layer in report.layers}),
                "skipped": report.skipped,
                "notes": report.warnings,
            }
        return facts, model

    def _in_one_pass(self, model: Any, windows: Tensor) -> dict[str, Any]:
        logits, seconds = _timed(lambda: in_one_pass(model, windows))
        return {**compare(logits, self._expected()[: len(windows)], windows), "seconds": seconds}

    def _token_by_token(self, model: Any, windows: Tensor) -> dict[str, Any]:
        prompt = self._settings.prompt
        logits, seconds = _timed(lambda: token_by_token(model, windows, prompt))
        expected = self._expected()[: len(windows), prompt - 1 :]
        return {**compare(logits, expected, windows[:, prompt - 1 :]), "seconds": seconds}

    def _expected(self) -> Tensor:
        if self._reference is None:
            row = all_rows(generation_of(self._settings.model))[REFERENCE]
            self._reference = in_one_pass(load(row, TRAINED[self._settings.model], {}), self._windows)
        return self._reference


def compare(logits: Tensor, reference: Tensor, windows: Tensor) -> dict[str, Any]:
    """Perplexity, its multiple of the reference's, KL and agreement, with intervals.

    Args:
        logits, reference: float32 [windows, n, vocabulary], after each token of ``windows`` [windows, n].
    """
    scores = score_windows(_given(logits), list(windows), _given(reference))
    facts = summarize(scores)
    low, high = _ratio_interval(scores)
    facts["perplexity_ratio"] = facts["perplexity"] / facts["reference_perplexity"]
    facts["intervals"]["perplexity_ratio"] = [low, high]
    return facts


def _given(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits that are known, a window's after the other."""
    windows = iter(logits)
    return lambda ids: next(windows).unsqueeze(0)


def _ratio_interval(scores: WindowScores) -> tuple[float, float]:
    """Of the perplexities' ratio, on the same windows: how hard a window is cancels out."""
    pairs = zip(
        scores.sums["negative_log_likelihood"], scores.sums["reference_negative_log_likelihood"], strict=True
    )  # fmt: skip
    low, high = bootstrap_interval([own - other for own, other in pairs], scores.tokens)
    return math.exp(low), math.exp(high)


def checkpoint_bytes(model: Any) -> int:
    """Of the weight files, saved with what is not packed in 16 bits. The model is changed."""
    with tempfile.TemporaryDirectory() as folder:
        for parameter in model.parameters():
            if type(parameter) in (torch.nn.Parameter, Tensor) and parameter.dtype == torch.float32:
                parameter.data = parameter.data.half()
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.monotonic()
    return work(), time.monotonic() - started
