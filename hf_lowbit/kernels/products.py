"""Products with packed weights, each by the route that suits it. No gradients here: see autograd.

Scales that are codes are decoded first, each time, to plain ones that every route reads: a few bits for each weight
while the product lasts, and the time to unpack them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, decode
from hf_lowbit.formats import decode_rows as reference_rows
from hf_lowbit.formats.packed import with_plain_scales
from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.kernels.reference import reference_gradient, reference_product
from hf_lowbit.kernels.routes import native, route
from hf_lowbit.kernels.sliced import sliced_linear
from hf_lowbit.kernels.tiles import tiled_gradient, tiled_product


def product(
    x: Tensor,
    packed: PackedTensor,
    activation: ActivationSpec | None,
    backend: str | None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """x ``[..., columns]`` times a packed ``[rows, columns]``: ``[..., rows]`` in x's type."""
    packed = with_plain_scales(packed)
    if activation is None:  # the commonest case by the shortest way: a token takes hundreds of these
        matrix = native(packed, x.device, x.dtype, backend)
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if matrix is not None and route(tokens, matrix, None) == "native":
            (result,) = cpu.linear(tokens, (matrix,))
            return result if x.dim() == 2 else result.view(*x.shape[:-1], matrix.rows)
    return products(x, [packed], activation, backend, input_scale)[0]


def products(
    x: Tensor,
    weights: Sequence[PackedTensor],
    activation: ActivationSpec | None,
    backend: str | None,
    input_scale: Tensor | None = None,
) -> list[Tensor]:
    """x times several packed matrices of the same input width; what can be shared between them is done once."""
    tokens, weights = x.reshape(-1, x.shape[-1]), [with_plain_scales(packed) for packed in weights]
    matrices = [native(packed, x.device, x.dtype, backend) for packed in weights]
    ways = [route(tokens, matrix, activation) for matrix in matrices]
    if activation is not None and any(way != "reference" for way in ways):
        codes, scale = quantize_tokens(tokens, activation, input_scale)
    results: list[Tensor | None] = [None] * len(weights)
    for way in ("native", "int8"):  # one call of the native kernel for all that take this way
        chosen = [i for i, other in enumerate(ways) if other == way]
        described = [matrix for i in chosen if (matrix := matrices[i]) is not None]
        if not chosen:
            continue
        if way == "native":
            computed = cpu.linear(tokens, described)
        else:
            computed = cpu.linear_int8(codes, scale, described, x.dtype)
        for i, result in zip(chosen, computed, strict=True):
            results[i] = result
    for i, (way, matrix) in enumerate(zip(ways, matrices, strict=True)):
        if way == "reference":
            results[i] = reference_product(tokens, weights[i], activation, input_scale)
        elif way == "tiles" and matrix is not None:
            results[i] = tiled_product(tokens, matrix)
        elif way == "sliced":
            results[i] = sliced_linear(codes, scale, weights[i], x.dtype).to(x.dtype)
    leading = x.shape[:-1]
    return [result.reshape(*leading, result.shape[-1]) for result in results if result is not None]


def input_gradient(gradient: Tensor, packed: PackedTensor, backend: str | None) -> Tensor:
    """Gradient ``[..., rows]`` of a product to that of its input, ``[..., columns]``."""
    tokens, packed = gradient.reshape(-1, gradient.shape[-1]), with_plain_scales(packed)
    matrix = native(packed, gradient.device, gradient.dtype, backend)
    result = reference_gradient(tokens, packed) if matrix is None else tiled_gradient(tokens, matrix)
    return result.reshape(*gradient.shape[:-1], result.shape[-1])


def decode_matrix(packed: PackedTensor, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """:func:`hf_lowbit.formats.decode`, natively where that is possible: the same bits, sooner."""
    packed = with_plain_scales(packed)
    if packed.weight.dim() > 2:
        return torch.stack([decode_matrix(packed[i], dtype, backend) for i in range(packed.weight.shape[0])])
    matrix = native(packed, packed.weight.device, dtype, backend)
    return decode(packed, dtype) if matrix is None else cpu.decode_rows(matrix, slice(None), dtype)


def look_up_rows(packed: PackedTensor, index: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Decoded rows ``[n, columns]`` for a 1-D index. Raises IndexError for an index out of range."""
    matrix = native(packed, index.device, dtype, backend)
    return reference_rows(packed, index).to(dtype) if matrix is None else cpu.decode_rows(matrix, index, dtype)
