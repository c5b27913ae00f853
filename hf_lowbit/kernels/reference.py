"""The reference product x W^T: decode exactly, then multiply with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.formats import ActivationSpec, PackedTensor, decode
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.kernels.sliced import sliced_linear


class _PackedLinear(torch.autograd.Function):
    """Gradient to the input only; the weight is decoded again in backward, so no dense copy is kept between them.

    Rounding of activations is passed straight through (straight-through estimator).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedTensor, activation: ActivationSpec | None) -> Tensor:
        ctx.packed = packed
        if activation is None:
            return F.linear(x, decode(packed, x.dtype))
        tokens = x.reshape(-1, x.shape[-1])
        result = sliced_linear(*quantize_tokens(tokens, activation), packed, x.dtype)
        return result.to(x.dtype).reshape(*x.shape[:-1], result.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ decode(ctx.packed, gradient.dtype), None, None


def packed_linear(x: Tensor, packed: PackedTensor, activation: ActivationSpec | None = None) -> Tensor:
    """x ``[..., columns]`` float times a packed ``[rows, columns]``, giving ``[..., rows]`` in x's type.

    Without ``activation`` the weight is decoded in float32, rounded once to x's type, and multiplied by torch. With
    it, x is quantized per token and the codes are multiplied (see :mod:`hf_lowbit.kernels.sliced`). Differentiable in
    x.
    """
    result: Tensor = _PackedLinear.apply(x, packed, activation)
    return result
