"""Fréchet distance of Gaussian fits to features: FID's formula in any feature space (Heusel et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GaussianFit(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features, float64."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor) -> GaussianFit:
    """Fit features [n, d].

    Raises:
        ValueError: fewer than two, or not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a Gaussian is fitted to features [n, d], n >= 2, not {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values: were the pictures finite?")
    values = features.double()
    return GaussianFit(values.mean(0), values.T.cov().reshape(values.shape[1], -1))


def frechet_distance(first: GaussianFit, second: GaussianFit) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), never below 0.

    The trace of the root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric: eigenvalues instead of a matrix
    root, exact for singular covariances too. Fits to few features are biased upwards (by about d / n of the spread):
    compare distances at equal numbers of pictures only.

    Raises:
        ValueError: features of different widths.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of {first.mean.numel()} and {second.mean.numel()} numbers cannot be compared")
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * mixed
    return max(float((first.mean - second.mean).square().sum() + spread), 0.0)
