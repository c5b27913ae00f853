"""The reference product x W^T in torch: decode exactly, then multiply. Every other backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.formats import ActivationSpec, PackedTensor, decode, decode_rows
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.kernels.shifted import shifted_product
from hf_lowbit.kernels.sliced import sliced_linear

# Of the weight, decoded at a time in backward: 16 MB in float32, enough to keep an accelerator busy.
_TILE_ELEMENTS = 1 << 22


def reference_product(
    x: Tensor,
    packed: PackedTensor,
    activation: ActivationSpec | None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
) -> Tensor:
    """x ``[tokens, columns]`` to ``[tokens, rows]`` in x's type.

    Without ``activation`` the weight is decoded in float32, rounded once to x's type, and multiplied by torch. With
    it, x is quantized and the codes are multiplied (see :mod:`hf_lowbit.kernels.sliced`).
    """
    if activation is None:
        return F.linear(x, decode(packed, x.dtype))
    inputs = quantize_tokens(x, activation, input_scale, input_shift)
    return shifted_product(sliced_linear(inputs.codes, inputs.scale, packed, x.dtype), inputs, packed).to(x.dtype)


def reference_gradient(gradient: Tensor, packed: PackedTensor) -> Tensor:
    """Gradient ``[tokens, rows]`` times the decoded weight: ``[tokens, columns]`` in the gradient's type.

    Some rows are decoded at a time, so that there is never a dense copy of a large weight; their products are summed in
    float32.
    """
    rows, step = packed.weight.shape[0], max(16, _TILE_ELEMENTS // packed.columns)
    if rows <= step:
        return gradient @ decode(packed, gradient.dtype)
    result = torch.zeros(gradient.shape[0], packed.columns, device=gradient.device)
    for start in range(0, rows, step):
        own = slice(start, min(start + step, rows))
        result += gradient[:, own] @ decode_rows(packed, own).to(gradient.dtype)
    return result.to(gradient.dtype)
