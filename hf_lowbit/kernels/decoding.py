"""The one entry to decoded weights: eager, or traced by torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import ops, products


def decode_matrix(packed: PackedTensor, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """The dequantized matrix ``[..., rows, columns]``: :func:`hf_lowbit.formats.decode`, the same bits, sooner."""
    decode = ops.decode_matrix if torch.compiler.is_compiling() else products.decode_matrix
    return decode(packed, dtype, backend)


def look_up_rows(packed: PackedTensor, index: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Dequantized rows ``[n, columns]`` for a 1-D index. Raises IndexError for an index out of range."""
    if packed.scale_range is not None:  # no need to decode the scales of all the others
        return decode_matrix(packed.rows(index), dtype, backend)
    look_up = ops.look_up_rows if torch.compiler.is_compiling() else products.look_up_rows
    return look_up(packed, index, dtype, backend)
