"""How far a language model's predictions move when one group of its layers is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.progress import Progress
from hf_lowbit.calibration.substitution import Rounding, substituted
from hf_lowbit.calibration.units import Batch, without_cache
from hf_lowbit.plan import PlannedLayer


class SensitivityError(ValueError):
    """A model that a metric cannot be measured on."""


@torch.no_grad()
def group_divergences(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    candidates: Mapping[str, Sequence[PlannedLayer]],
    batches: Sequence[Batch],
    rounding: Rounding,
) -> list[list[float]]:
    """Metric "kl": KL(float || rounded) of the next token with one group alone rounded, mean over tokens, in nats.

    ZeroQ's sensitivity (arXiv 2001.00281). One forward of all batches for every group and candidate, in the model's own
    type; the weights are put back after each, the same tensors.

    Args:
        groups: names of layers.
        candidates: layer -> what it may become; as many for all layers of a group.
        batches: keyword arguments of the model's forward, without padding.
        rounding: matrix and spec -> packed tensor.

    Returns:
        For every group the divergence at each of its candidates.

    Raises:
        SensitivityError: the model returns no logits.
        RoundingError: a weight that cannot be rounded.
    """
    batches = [without_cache(model, batch) for batch in batches]
    references = [logits_of(model, batch) for batch in batches]
    progress = Progress(len(groups))
    losses: list[list[float]] = []
    for group in groups:
        own = []
        for index in range(len(candidates[group[0]])):
            with substituted(model, {name: candidates[name][index] for name in group}, rounding):
                pairs = zip(references, batches, strict=True)
                found = [logit_divergence(reference, logits_of(model, batch)) for reference, batch in pairs]
            own.append(torch.cat(found).mean().item())
        losses.append(own)
        progress.step(group[0], False)
    return losses


def logit_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of every token, float32 ``[tokens]`` in nats, from logits ``[..., vocabulary]``.

    With d = log p - log q as the sum of p (d + e^-d - 1), which equals that of p d but has no term below zero: the
    divergences of 8 bits, squares of small d, would drown in the rounding errors of d.
    """
    log_p, log_q = (x.reshape(-1, x.shape[-1]).float().log_softmax(-1) for x in (reference, logits))
    p, d = log_p.exp(), log_p - log_q
    far = p * (d - 1) + log_q.exp()  # the same, without e^-d, which may overflow
    return torch.where(d.abs() < 1, p * (d + torch.expm1(-d)), far).sum(-1)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """What a language model predicts for a batch, ``[sequences, tokens, vocabulary]``.

    Raises:
        SensitivityError: the model returns no logits.
    """
    output = model(**batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise SensitivityError(
            f"the metric 'kl' needs logits, and a {type(model).__name__} returns none: use 'hessian'"
        )
    return logits
