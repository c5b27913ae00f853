"""Perplexity and divergence of causal language models on given windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_lowbit.evaluation.logits import LogitSource
from hf_lowbit.evaluation.perplexity import to_perplexity
from hf_lowbit.evaluation.scores import score_windows


class Divergence(NamedTuple):
    """Means over predicted tokens: KL(reference || model) in nats, and the share of equal top-1 predictions."""

    kl: float
    top1_agreement: float


def measure_perplexity(model: LogitSource, windows: Sequence[Tensor]) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens of the windows.

    Args:
        windows: token ids, int64 [n] each, n >= 2 (`split_windows`).

    Raises:
        ValueError: no window.
        FloatingPointError: NaN or infinite logits.
    """
    return to_perplexity(score_windows(model, windows).mean("negative_log_likelihood"))


def measure_divergence(model: LogitSource, reference: LogitSource, windows: Sequence[Tensor]) -> Divergence:
    """Divergence of a model from a reference; the reference's logits are computed alongside, window by window.

    Raises:
        ValueError: no window, or vocabularies of different sizes.
        FloatingPointError: NaN or infinite logits.
    """
    scores = score_windows(model, windows, reference)
    return Divergence(scores.mean("kl"), scores.mean("top1_agreement"))
