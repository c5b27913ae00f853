"""The reference product x W^T in torch: decode exactly, then multiply. Every other backend is tested against it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.formats import ActivationSpec, PackedTensor, decode
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.kernels.sliced import sliced_linear


def reference_product(x: Tensor, packed: PackedTensor, activation: ActivationSpec | None) -> Tensor:
    """x ``[tokens, columns]`` to ``[tokens, rows]`` in x's type.

    Without ``activation`` the weight is decoded in float32, rounded once to x's type, and multiplied by torch. With
    it, x is quantized per token and the codes are multiplied (see :mod:`hf_lowbit.kernels.sliced`).
    """
    if activation is None:
        return F.linear(x, decode(packed, x.dtype))
    return sliced_linear(*quantize_tokens(x, activation), packed, x.dtype).to(x.dtype)
