"""Products with packed weights, each by the route that suits it. No gradients here: see autograd.

Scales that are codes are decoded first, each time, to plain ones that every route reads: a few bits for each weight
while the product lasts, and the time to unpack them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, decode
from hf_lowbit.formats.packed import with_plain_scales
from hf_lowbit.kernels import cpu, triton
from hf_lowbit.kernels.activation import Codes, quantize_tokens, restore_tokens
from hf_lowbit.kernels.gpu import gpu_product
from hf_lowbit.kernels.known import known_products
from hf_lowbit.kernels.reference import reference_gradient, reference_product
from hf_lowbit.kernels.routes import gpu_runs, native, on_gpu, route
from hf_lowbit.kernels.shifted import shifted_product
from hf_lowbit.kernels.sliced import sliced_linear
from hf_lowbit.kernels.tiles import tiled_gradient, tiled_product


def product(
    x: Tensor,
    packed: PackedTensor,
    activation: ActivationSpec | None,
    backend: str | None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """x ``[..., columns]`` times a packed ``[rows, columns]``: ``[..., rows]`` in x's type."""
    if activation is not None and input_scale is not None and input_shift is None:  # common: by the shortest way
        packed = with_plain_scales(packed)
        matrix = native(packed, x.device, x.dtype, backend)
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if matrix is not None and packed.columns == x.shape[-1] and route(tokens, matrix, activation) == "int8":
            codes, scale, _ = quantize_tokens(tokens, activation, input_scale)
            (result,) = cpu.linear_int8(codes, scale, (matrix,), x.dtype)
            return result if x.dim() == 2 else result.view(*x.shape[:-1], matrix.rows)
    return products(x, [packed], activation, backend, input_scale, input_shift, [sums])[0]


def products(
    x: Tensor,
    weights: Sequence[PackedTensor],
    activation: ActivationSpec | None,
    backend: str | None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    sums: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """x times several packed matrices of the same input width; what can be shared between them is done once.

    Args:
        input_scale, input_shift: of :func:`hf_lowbit.kernels.quantize_tokens`.
        sums: :func:`hf_lowbit.kernels.row_sums` of each matrix, where inputs have a shift; computed where missing.

    Raises:
        ValueError: another number of columns.
    """
    if activation is None and (known := known_products(x, weights, backend)) is not None:
        return known(x)
    tokens, leading = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if activation is None:
        results = _products_of_floats(tokens, [with_plain_scales(packed) for packed in weights], backend)
    else:
        if gpu_runs(tokens.device, backend) and triton.quantizes(tokens, activation):
            inputs = Codes(*triton.quantize_tokens(tokens, activation))
        elif backend in (None, "cpu") and cpu.quantizes(tokens, activation):
            inputs = Codes(*cpu.quantize_tokens(tokens, activation))
        else:
            inputs = quantize_tokens(tokens, activation, input_scale, input_shift)
        results = products_of_codes(inputs, weights, activation, backend, x.dtype, sums)
    return [result.reshape(*leading, result.shape[-1]) for result in results]


def flat_products(x: Tensor, weights: Sequence[PackedTensor], activation: ActivationSpec | None) -> Tensor:
    """:func:`products` one after the other, flat."""
    results = [result.reshape(-1) for result in products(x, weights, activation, None)]
    return results[0] if len(results) == 1 else torch.cat(results)


def products_of_codes(
    inputs: Codes,
    weights: Sequence[PackedTensor],
    activation: ActivationSpec,
    backend: str | None,
    dtype: torch.dtype,
    sums: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Quantized inputs times several packed matrices ``[rows, columns]``: ``[tokens, rows]`` of each, in ``dtype``.

    Raises:
        ValueError: another number of columns.
    """
    codes, scale, shift = inputs
    _check_columns(codes, weights)
    weights = [with_plain_scales(packed) for packed in weights]
    matrices = [native(packed, codes.device, dtype, backend) for packed in weights]
    chosen = [matrix for matrix in matrices if matrix is not None and route(codes, matrix, activation) == "int8"]
    wide = dtype if shift is None else torch.float32  # what is not complete is not rounded
    computed = cpu.linear_int8(codes, scale, chosen, wide) if chosen else []  # one call for all of them
    done = {id(matrix): result for matrix, result in zip(chosen, computed, strict=True)}
    results = []
    for index, (packed, matrix) in enumerate(zip(weights, matrices, strict=True)):
        if id(matrix) in done:
            result = done[id(matrix)]
        elif (own := _codes_on_gpu(inputs, packed, activation, backend, wide)) is not None:
            result = own
        elif matrix is not None and route(codes, matrix, activation) == "floats":
            results.append(_products_of_floats(restore_tokens(*inputs), [packed], backend)[0].to(dtype))
            continue
        else:
            result = sliced_linear(codes, scale, packed, dtype)
        results.append(shifted_product(result, inputs, packed, sums[index] if sums else None).to(dtype))
    return results


def _codes_on_gpu(
    inputs: Codes, packed: PackedTensor, activation: ActivationSpec, backend: str | None, dtype: torch.dtype
) -> Tensor | None:
    """Products of codes by the Triton kernels; None where they have none."""
    gpu = on_gpu(packed, inputs.codes.device, torch.bfloat16, backend)
    if gpu is None or not triton.multiplies_codes(gpu, activation):
        return None
    return triton.linear_of_codes(inputs.codes, inputs.scale, gpu, dtype)


def convolution_of_codes(
    inputs: Codes,
    packed: PackedTensor,
    activation: ActivationSpec,
    backend: str | None,
    dtype: torch.dtype,
    sums: Tensor | None = None,
) -> Tensor:
    """Quantized patches times a packed ``[rows, channels * taps]``: ``[positions, rows]`` in ``dtype``.

    Args:
        inputs: codes ``[..., *kernel, channels]`` of all positions, scales and shifts ``[positions, groups]``.
    """
    channels, positions = inputs.codes.shape[-1], inputs.scale.shape[0]
    taps = packed.columns // channels
    matrix = native(packed, inputs.codes.device, dtype, backend)
    together = inputs.codes.reshape(positions, -1)  # tap by tap, as they lie: runs of all channels are copied
    one_group = inputs.scale.shape[-1] == 1 and packed.spec.groups(packed.columns) == 1 and packed.scale_range is None
    way = route(together, matrix, activation)  # patches of floats cost each position, unpacking costs each row
    unpacks = way in ("reference", "sliced") or (way == "floats" and positions > packed.weight.shape[0])
    if one_group and unpacks:
        result = sliced_linear(together, inputs.scale, packed, dtype, taps)
        return shifted_product(result, inputs, packed, sums).to(dtype)
    patches = together.unflatten(1, (taps, channels)).transpose(1, 2).flatten(1)
    return products_of_codes(inputs._replace(codes=patches), [packed], activation, backend, dtype, [sums])[0]


def _check_columns(tokens: Tensor, weights: Sequence[PackedTensor]) -> None:
    if any(packed.columns != tokens.shape[1] for packed in weights):
        raise ValueError(
            f"inputs of {tokens.shape[1]} columns, and weights of {[packed.columns for packed in weights]}"
        )


def _products_of_floats(tokens: Tensor, weights: Sequence[PackedTensor], backend: str | None) -> list[Tensor]:
    _check_columns(tokens, weights)
    matrices = [native(packed, tokens.device, tokens.dtype, backend) for packed in weights]
    chosen = [matrix for matrix in matrices if matrix is not None and route(tokens, matrix, None) == "native"]
    computed = cpu.linear(tokens, chosen) if chosen else []  # one call for all of them
    done = {id(matrix): result for matrix, result in zip(chosen, computed, strict=True)}
    results = []
    for packed, matrix in zip(weights, matrices, strict=True):
        if (gpu := on_gpu(packed, tokens.device, tokens.dtype, backend)) is not None:
            results.append(gpu_product(tokens, gpu, backend))
        elif matrix is None:
            results.append(reference_product(tokens, packed, None))
        else:
            results.append(done[id(matrix)] if id(matrix) in done else tiled_product(tokens, matrix))
    return results


def input_gradient(gradient: Tensor, packed: PackedTensor, backend: str | None) -> Tensor:
    """Gradient ``[..., rows]`` of a product to that of its input, ``[..., columns]``."""
    tokens, packed = gradient.reshape(-1, gradient.shape[-1]), with_plain_scales(packed)
    matrix = native(packed, gradient.device, gradient.dtype, backend)
    if (gpu := on_gpu(packed, gradient.device, gradient.dtype, backend)) is not None:
        result = triton.linear_gradient(tokens, gpu)
    else:
        result = reference_gradient(tokens, packed) if matrix is None else tiled_gradient(tokens, matrix)
    return result.reshape(*gradient.shape[:-1], result.shape[-1])


def decode_matrix(packed: PackedTensor, dtype: torch.dtype = torch.float32, backend: str | None = None) -> Tensor:
    """:func:`hf_lowbit.formats.decode`, natively where that is possible: the same bits, sooner."""
    packed = with_plain_scales(packed)
    if packed.weight.dim() > 2:
        return torch.stack([decode_matrix(packed[i], dtype, backend) for i in range(packed.weight.shape[0])])
    if (gpu := on_gpu(packed, packed.weight.device, dtype, backend)) is not None:
        return triton.decode_rows(gpu, slice(None), dtype)
    matrix = native(packed, packed.weight.device, dtype, backend)
    return decode(packed, dtype) if matrix is None else cpu.decode_rows(matrix, slice(None), dtype)


def look_up_rows(packed: PackedTensor, index: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Decoded rows ``[n, columns]`` for a 1-D index. Raises IndexError for an index out of range."""
    matrix = native(packed, index.device, dtype, backend)
    if matrix is None:  # index_select refuses such an index on every device
        return decode_matrix(packed.rows(index), dtype, backend)
    return cpu.decode_rows(matrix, index, dtype)
