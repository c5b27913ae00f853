"""Perplexity of a causal language model."""

from __future__ import annotations

import math

from torch import Tensor


def negative_log_likelihood(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Surprise at each target, in nats.

    Args:
        log_probabilities: float32 [n, vocabulary].
        targets: int64 [n].

    Returns:
        float32 [n].
    """
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def to_perplexity(nats_per_token: float) -> float:
    """exp of a mean negative log-likelihood; infinity where that exceeds a float."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf
