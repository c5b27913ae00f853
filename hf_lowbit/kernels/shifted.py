"""What the shift of quantized inputs adds to a product.

Of x = scale * codes + shift the codes multiply as if there were no shift, whatever they are; the shift is the same for
all inputs of a group, and so its product is that of the shift and the sum of the group's decoded weights: one number
for each row and group, which depends on the weight alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, decode_rows
from hf_lowbit.kernels.activation import Codes

_ELEMENTS = 1 << 22  # decoded at a time


def row_sums(packed: PackedTensor, groups: int) -> Tensor:
    """Sums of the decoded weights ``[..., rows, columns]`` over groups of inputs: float32 ``[..., rows, groups]``."""
    if packed.weight.dim() > 2:
        return torch.stack([row_sums(packed[i], groups) for i in range(packed.weight.shape[0])])
    rows, step = packed.weight.shape[0], max(1, _ELEMENTS // packed.columns)
    width = packed.columns // groups
    sums = [
        decode_rows(packed, slice(start, min(start + step, rows)))
        .unflatten(-1, (groups, width))
        .sum(-1, dtype=torch.float64)
        for start in range(0, rows, step)
    ]
    return torch.cat(sums).float()


def shifted_product(product: Tensor, inputs: Codes, packed: PackedTensor, sums: Tensor | None = None) -> Tensor:
    """The product of inputs that are quantized with a shift.

    Args:
        product: of their codes with the weight, float32 ``[tokens, rows]``.
        sums: of the weight (:func:`row_sums`); None computes them.
    """
    if inputs.shift is None:
        return product
    sums = row_sums(packed, inputs.shift.shape[-1]) if sums is None else sums
    return product + inputs.shift @ sums.t()
