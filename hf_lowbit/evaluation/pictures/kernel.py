"""Squared maximum mean discrepancy with the polynomial kernel: KID's formula (Binkowski et al. 2018)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SUBSETS = 100


class KernelDistance(NamedTuple):
    """Mean over subsets of pictures, and the interval that holds 95 % of the subsets' values."""

    value: float
    low: float
    high: float


def polynomial_mmd(first: Tensor, second: Tensor, paired: bool = False) -> float:
    """Unbiased MMD^2 with k(x, y) = (x . y / d + 1)^3 of features [n, d] and [m, d], in float64.

    Its expectation is 0 for equal distributions, so that it may be negative.

    Args:
        paired: features of one row belong together (pictures of the same prompt, or also the same seed; n = m):
            k(x_i, y_i) is left out, as in eq. 4 of Gretton et al. 2012. It is unbiased then too, and 0 for equal
            pictures.

    Raises:
        ValueError: fewer than two features, or features that do not fit together.
    """
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"features {list(first.shape)} and {list(second.shape)}: 2 or more each, of one width, needed")
    if paired and len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} pictures are no pairs")
    x, y = first.double(), second.double()
    within = sum(float(_off_diagonal(_kernel(z, z))) for z in (x, y))
    across = _kernel(x, y)
    return within - 2 * float(_off_diagonal(across) if paired else across.mean())


def kernel_distance(
    first: Tensor,
    second: Tensor,
    *,
    paired: bool = False,
    subset_size: int | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> KernelDistance:
    """KID: :func:`polynomial_mmd` of random subsets, drawn without replacement.

    Args:
        first, second: features [n, d] and [m, d].
        subset_size: pictures in a subset; None takes half of the smaller set, at most 1000. The interval is that of
            distances between sets of this size.
        seed: of the subsets.
    """
    smaller = min(len(first), len(second))
    size = min(max(smaller // 2, 2), 1000) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(f"subset_size={size} must lie between 2 and the number of pictures, {smaller}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows = torch.randperm(len(first), generator=generator)[:size]
        others = rows if paired else torch.randperm(len(second), generator=generator)[:size]
        values.append(polynomial_mmd(first[rows], second[others], paired))
    low, high = np.percentile(values, [2.5, 97.5])
    return KernelDistance(float(np.mean(values)), float(low), float(high))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Mean of a square matrix without its diagonal."""
    n = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1))
