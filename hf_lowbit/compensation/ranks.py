"""What is left of a rounding error at each of several ranks: the losses that an allocation of ranks chooses from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_lowbit.compensation.low_rank import low_rank_factors, tail_energies, weighted_error
from hf_lowbit.compensation.weighting import diag_weighting


def remaining_errors(
    error: Tensor, ranks: Sequence[int], metric: str = "full", moment: Tensor | None = None, branches: int = 1
) -> list[float]:
    """tr(E_r R E_r^T) of the error that factors of each rank leave, summed over a stack.

    The error of the output counts whatever the factors were solved for: of the metric "full", or without R, these are
    the tails of one spectrum (:func:`tail_energies`); of the others the factors of the largest rank are found, and
    those of smaller ranks are parts of them. "mean_abs" counts as "diag", which it is close to [ours]. So are factors
    of few bits as exact ones.

    Args:
        error: float ``[..., rows, columns]``.
        ranks: 0 for none; those above full rank leave nothing.
        metric: of :data:`hf_lowbit.compensation.METRICS`.
        moment: R, ``[columns, columns]``; None for I.
        branches: projections stacked along the rows, each with factors of its own.
    """
    left = [0.0] * len(ranks)
    for part in error.chunk(branches, -2):
        for index, energy in enumerate(_remaining(part, ranks, metric, moment)):
            left[index] += energy
    return left


def _remaining(error: Tensor, ranks: Sequence[int], metric: str, moment: Tensor | None) -> list[float]:
    if not any(ranks):
        return [weighted_error(error, moment).sum().item()] * len(ranks)
    largest = min(max(ranks), *error.shape[-2:])
    if metric == "full" or moment is None:
        tails = tail_energies(error, moment)
        return [tails[..., min(rank, tails.shape[-1] - 1)].sum().item() for rank in ranks]
    weighting = None if metric == "identity" else diag_weighting(moment.diagonal())
    a, b = low_rank_factors(error, largest, weighting)
    return [weighted_error(error - b[..., :rank] @ a[..., :rank, :], moment).sum().item() for rank in ranks]
