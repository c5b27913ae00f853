"""How far a model's predictions are from a reference's."""

from __future__ import annotations

from torch import Tensor


def kl_divergence(reference_log_probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(reference || model) of each row, in nats; rounding below zero is set to zero.

    Args:
        reference_log_probabilities: float32 [n, vocabulary].
        log_probabilities: float32 [n, vocabulary].

    Returns:
        float32 [n].
    """
    difference = reference_log_probabilities - log_probabilities
    return (reference_log_probabilities.exp() * difference).sum(-1).clamp_min(0)


def top1_agreement(reference_log_probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """Whether both give the highest probability to the same token, bool [n]."""
    return reference_log_probabilities.argmax(-1) == log_probabilities.argmax(-1)
