"""Sums over the predicted tokens of each window: what every statistic and its interval are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_lowbit.evaluation.divergence import kl_divergence, top1_agreement
from hf_lowbit.evaluation.logits import LogitSource, evaluation_mode, log_probability_chunks, next_token_logits
from hf_lowbit.evaluation.perplexity import negative_log_likelihood


@dataclass
class WindowScores:
    """Per window: the number of predicted tokens, and the sum over them of each quantity.

    ``sums`` has "negative_log_likelihood" and, where there is a reference, "reference_negative_log_likelihood", "kl"
    (all in nats) and "top1_agreement" (a count).
    """

    tokens: list[int] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, name: str) -> float:
        """Mean over all predicted tokens."""
        return sum(self.sums[name]) / sum(self.tokens)

    def add(self, tokens: int, sums: dict[str, float]) -> None:
        """Append one window."""
        self.tokens.append(tokens)
        for name, value in sums.items():
            self.sums.setdefault(name, []).append(value)


def score_windows(model: LogitSource, windows: Sequence[Tensor], reference: LogitSource | None = None) -> WindowScores:
    """Run the windows through the model, and through the reference if there is one, one window at a time.

    Log-probabilities are float32, sums float64. At no time are logits of more than one window in memory.

    Args:
        windows: token ids, int64 [n] each, n >= 2.

    Raises:
        ValueError: no window, or vocabularies of different sizes.
        FloatingPointError: NaN or infinite logits.
    """
    if not windows:
        raise ValueError("there is no window to evaluate: the text is too short")
    scores = WindowScores()
    with evaluation_mode(model, reference):
        for index, window in enumerate(windows):
            logits = [next_token_logits(source, window) for source in (model, reference) if source is not None]
            if len({values.shape[-1] for values in logits}) > 1:
                sizes = " and ".join(str(values.shape[-1]) for values in logits)
                raise ValueError(f"model and reference have vocabularies of different sizes: {sizes}")
            scores.add(window.numel() - 1, _window_sums(f"window {index}", window[1:], logits))
    return scores


def _window_sums(name: str, targets: Tensor, logits: Sequence[Tensor]) -> dict[str, float]:
    targets = targets.to(logits[0].device)
    sums: dict[str, float] = {}
    for part, (model, *reference) in log_probability_chunks(name, *logits):
        values = {"negative_log_likelihood": negative_log_likelihood(model, targets[part])}
        if reference:
            values["reference_negative_log_likelihood"] = negative_log_likelihood(reference[0], targets[part])
            values["kl"] = kl_divergence(reference[0], model)
            values["top1_agreement"] = top1_agreement(reference[0], model)
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + float(value.sum(dtype=torch.float64))
    return sums
