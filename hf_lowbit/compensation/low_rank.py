"""The low-rank matrices that repair what rounding lost."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation B A of a rounding error in the Frobenius norm (ZeroQuant-V2's LoRC, arXiv 2303.08302).

    The singular values are shared between both factors (B = U S^1/2, A = S^1/2 V^T), so that neither overflows
    half precision.

    Args:
        error: float ``[rows, columns]``, or stacked ``[..., rows, columns]``.
        rank: at most min(rows, columns).

    Returns:
        float32 A ``[..., rank, columns]`` and B ``[..., rows, rank]``.

    Raises:
        ValueError: the rank exceeds the matrix.
    """
    if rank > min(error.shape[-2:]):
        raise ValueError(f"rank {rank} exceeds the smaller side of a {error.shape[-2]} x {error.shape[-1]} matrix")
    u, s, vh = torch.linalg.svd(error.float(), full_matrices=False)
    root = s[..., :rank].sqrt()
    return root.unsqueeze(-1) * vh[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)
