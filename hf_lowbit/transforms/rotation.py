"""Random rotations, which spread outliers over all channels (QuaRot, arXiv 2404.00456, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.transforms.hadamard import hadamard, hadamard_base

Rotation = Callable[[Tensor], Tensor]  # x Q of ``[..., order]``, in float64


def random_hadamard(order: int, seed: int = 0) -> Rotation:
    """Q = diag(+-1) H / sqrt(order) with random signs: every entry is as large as any other.

    Where no Hadamard matrix of the order is known: :func:`random_orthogonal` [ours].
    """
    if hadamard_base(order) is None:
        return random_orthogonal(order, seed)
    signs = torch.randint(2, (order,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return lambda x: hadamard(x.double() * signs.to(x.device))


def random_orthogonal(order: int, seed: int = 0) -> Rotation:
    """Q uniformly distributed, by QR of a Gaussian matrix."""
    return _dense(_gaussian_q(order, seed))


def mean_preserving(order: int, seed: int = 0) -> Rotation:
    """Random Q with Q 1 = 1 = Q^T 1: LayerNorm commutes with it [ours].

    A random rotation of what is left without the mean, between two reflections that take the first unit vector to
    1 / sqrt(order).
    """
    axis = torch.full((order,), order**-0.5, dtype=torch.float64)
    axis[0] -= 1.0
    reflection = torch.eye(order, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.dot(axis).clamp(min=1e-300)
    one = torch.ones(1, 1, dtype=torch.float64)
    return _dense(reflection @ torch.block_diag(one, _gaussian_q(order - 1, seed)) @ reflection)


def _gaussian_q(order: int, seed: int) -> Tensor:
    gaussian = torch.randn(order, order, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()  # QR alone would not be uniform


def _dense(matrix: Tensor) -> Rotation:
    return lambda x: x.double() @ matrix.to(x.device)
