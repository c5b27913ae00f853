"""What QuIP does to a weight and its Hessian beside rotating them (Chee et al., arXiv 2307.13304)."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-8  # of either diagonal, in the authors' code
_RIDGE = 1e-2


def balancing_scale(weight: Tensor, hessian: Tensor) -> Tensor:
    """d, by which columns of the weight are multiplied and inputs divided: (diag H / diag W^T W)^(1/4).

    Channels then have the same share in both. A common factor changes neither rounding nor output: it is chosen so that
    the inputs keep their mean square, and half types their range [ours].

    Args:
        weight: ``[rows, columns]``.
        hessian: ``[columns, columns]``, mean of x x^T.

    Returns:
        float32 ``[columns]``, positive.
    """
    power = hessian.diagonal().float()
    largest = hessian.abs().max().float()
    h = (power / torch.where(largest > 0, largest, 1.0)).clamp(min=_LEAST)
    scale = (h / weight.float().square().sum(0).clamp(min=_LEAST)).pow(0.25).clamp(min=_LEAST)
    return scale * ((h / scale.square()).sum() / h.sum()).sqrt()


def with_ridge(hessian: Tensor) -> Tensor:
    """H n / tr H + 0.01 I, before any damping. A rotation leaves both terms alone: it may come before or after."""
    columns = len(hessian)
    conditioned = hessian * (columns / (hessian.diagonal().sum() + _LEAST))
    conditioned.diagonal().add_(_RIDGE)
    return conditioned


def incoherence(matrix: Tensor) -> float:
    """mu = max |a_ij| sqrt(m n) / ||A||_F of ``[m, n]``: 1 where all entries are of one size."""
    return float(matrix.abs().max() * matrix.numel() ** 0.5 / matrix.norm())
