"""Products on an NVIDIA GPU: by our Triton kernels, or by another library's where that backend was asked for."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.kernels import humming, triton


def gpu_product(x: Tensor, matrix: triton.Matrix, backend: str | None) -> Tensor:
    """x ``[tokens, columns]`` times a packed matrix: ``[tokens, rows]`` in x's type."""
    if backend == "humming" and humming.takes(x, matrix.packed):
        return humming.linear(x, matrix.packed)
    return triton.linear(x, matrix)
