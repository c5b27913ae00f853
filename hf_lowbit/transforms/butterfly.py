"""Two-factor butterflies: random orthogonal matrices of n = p q channels that cost n (p + q) to multiply with, not n^2.

QuIP (Chee et al., arXiv 2307.13304) mixes channels with V = (R_p kron R_q) P: a random permutation P, and two small
random rotations, each applied to every row or column of the channels laid out as ``[p, q]``. Of the variants of the
authors' code it is the one whose blocks share their rotation: p^2 + q^2 numbers in all.

[ours]: p is the largest divisor up to the square root, which makes p + q least; the authors deal the prime factors out
in turn, which gives 688 x 16 for 11008 and not 86 x 128. The authors permute the result once more; that only renames
channels that nobody else reads, and is left out.

Everything is drawn from a seed by numpy's RandomState, whose streams numpy keeps for ever, and computed in float64
before it is rounded to float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Butterfly(NamedTuple):
    """An orthogonal matrix V.

    Attributes:
        order: int32 ``[n]``, the channel that comes to each place before it is rotated.
        places: its inverse.
        outer: R_p, float32 ``[p, p]``.
        inner: R_q, float32 ``[q, q]``.
    """

    order: Tensor
    places: Tensor
    outer: Tensor
    inner: Tensor

    def to(self, device: torch.device) -> Butterfly:
        """On another device."""
        return Butterfly(*(tensor.to(device) for tensor in self))


def balanced_factors(size: int) -> tuple[int, int]:
    """p <= q with p q = size and p + q least; p is 1 where the size is prime.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a butterfly needs at least one channel, not {size}")
    outer = next(p for p in range(math.isqrt(size), 0, -1) if size % p == 0)
    return outer, size // outer


def draw_butterfly(size: int, *seeds: int) -> Butterfly:
    """The butterfly of ``size`` channels that these seeds name, each from 0 to 2^32 - 1; on the CPU.

    The rotations are Haar distributed: Q of a Gaussian matrix' QR decomposition with the signs that make R's diagonal
    positive.
    """
    outer, inner = balanced_factors(size)
    random = np.random.RandomState([*seeds, size])
    order = random.permutation(size).astype(np.int32)
    rotations = [torch.from_numpy(_rotation(random, width)) for width in (outer, inner)]
    return Butterfly(torch.from_numpy(order), torch.from_numpy(np.argsort(order).astype(np.int32)), *rotations)


def rotate(x: Tensor, butterfly: Butterfly) -> Tensor:
    """x V^T for rows x ``[..., n]``: each x becomes V x. In at least float32; differentiable."""
    outer, inner = _factors_for(x, butterfly)
    rows = _wide(x).index_select(1, butterfly.order).view(-1, len(outer), len(inner))
    return (outer @ (rows @ inner.t())).reshape(x.shape)


def rotate_back(x: Tensor, butterfly: Butterfly) -> Tensor:
    """x V for rows x ``[..., n]``: the inverse of :func:`rotate`."""
    outer, inner = _factors_for(x, butterfly)
    rows = outer.t() @ (_wide(x).view(-1, len(outer), len(inner)) @ inner)
    return rows.reshape(-1, x.shape[-1]).index_select(1, butterfly.places).view(x.shape)


def _rotation(random: np.random.RandomState, width: int) -> np.ndarray:
    q, r = np.linalg.qr(random.standard_normal((width, width)))
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).astype(np.float32)


def _wide(x: Tensor) -> Tensor:
    """Contiguous rows ``[tokens, n]`` in at least float32."""
    return x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _factors_for(x: Tensor, butterfly: Butterfly) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return butterfly.outer.to(dtype), butterfly.inner.to(dtype)
