"""Products of quantized activations and packed weights, group by group, before any scale is applied.

Each group of the input is one matrix product (a K-slice) of raw codes; its sum is scaled in float32. Where weights and
activations have groups of their own, a slice lies within one of each. Three arithmetics:
 - int8 codes times an integer table: int32 accumulation, exact. Processors without int8 dot products take float32
   slices of at most 1024 inputs instead, whose sums stay below 2^24 and are therefore the same integers;
 - anything else (NF, most powers, fitted tables; floating-point activations): both sides decode exactly to the input's
   type and multiply as floats; values of small floating-point formats in bfloat16, which holds them, where there are
   units for it that sum in float32. Reports name this "float (decoded)";
 - groups of weights and activations that have only a few inputs in common: as many products would take longer than
   decoding both sides, scales included, and one product of floats. Reports name this "simulated".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.number_format import look_up
from hf_lowbit.formats.packed import scales, table_of, zero_points
from hf_lowbit.kernels.activation import restore_tokens
from hf_lowbit.kernels.routes import has_bfloat16_units, has_int8_dot

_EXACT_FLOAT_WIDTH = 1024  # 1024 * 127 * 128 < 2^24: float32 holds every partial sum exactly
_CUDA_MULTIPLE = 8  # of every side of an int8 product there
_CUDA_LEAST_ROWS = 32  # torch asks for more than 16
_NARROWEST_SLICE = 16  # within one group of weights and one of activations, unless these are narrower themselves


def arithmetic(weight: WeightSpec, activation: ActivationSpec | None) -> str:
    """How they multiply: "decoded" weights; "int8" codes; "float (decoded)" or "simulated" for quantized inputs."""
    if activation is None:
        return "decoded"
    widths = [size for size in (weight.group_size, activation.group_size) if isinstance(size, int)]
    if activation.group_size is not None and _have_little_in_common(widths):
        return "simulated"
    return "int8" if multiplies_integers(weight, activation) else "float (decoded)"


def multiplies_integers(weight: WeightSpec, activation: ActivationSpec) -> bool:
    """True when weight and activation codes multiply as integers, group by group if they have groups."""
    return (
        activation.format == "int"
        and not weight.has_fitted_table
        and weight.number_format.integer_multiplier is not None
    )


def sliced_linear(
    codes: Tensor, scale: Tensor, packed: PackedTensor, dtype: torch.dtype, taps: int | None = None
) -> Tensor:
    """Activation codes times a packed weight.

    Args:
        codes: ``[tokens, columns]`` of int8 or float8.
        scale: float32 ``[tokens, groups]``.
        packed: ``[rows, columns]``.
        dtype: the type to multiply decoded values in, where integers cannot.
        taps: of a convolution, where the codes of a patch lie tap by tap, those of all channels together, and those of
            the weight channel by channel. For one group on both sides.

    Returns:
        float32 ``[tokens, rows]``.
    """
    groups = scale.shape[-1]
    widths = [packed.columns // groups, packed.columns // packed.spec.groups(packed.columns)]
    if groups > 1 and _have_little_in_common(widths):
        return torch.nn.functional.linear(restore_tokens(codes, scale), decode(packed))
    width = math.gcd(*widths)
    table, multiplier, product = _arithmetic(codes, packed, dtype)
    codes = codes if codes.dtype == table.dtype else codes.to(table.dtype)
    values = look_up(table, unpack_codes(packed.weight, packed.spec.bits, packed.columns, packed.spec.packing))
    if taps is not None:
        values = values.unflatten(-1, (-1, taps)).transpose(-2, -1).flatten(1)
    weight_scale, zero = scales(packed) / multiplier, zero_points(packed)
    result: Tensor | None = None
    for start in range(0, packed.columns, width):
        columns, group = slice(start, start + width), start * weight_scale.shape[-1] // packed.columns
        sums = product(codes[:, columns], values[:, columns]).float()
        if zero is not None:
            sums -= codes[:, columns].float().sum(-1, keepdim=True) * (zero[:, group] * multiplier)
        sums *= weight_scale[:, group]
        if groups > 1:
            sums *= scale[:, start * groups // packed.columns].unsqueeze(-1)
        result = sums if result is None else result.add_(sums)
    assert result is not None
    return result.mul_(scale) if groups == 1 else result


def _have_little_in_common(widths: list[int]) -> bool:
    return math.gcd(*widths) < min(_NARROWEST_SLICE, *widths)


def _arithmetic(
    codes: Tensor, packed: PackedTensor, dtype: torch.dtype
) -> tuple[Tensor, int, Callable[[Tensor, Tensor], Tensor]]:
    """Table in the type to multiply in, the factor it was multiplied by, and the product."""
    table = table_of(packed)
    integers = None if packed.spec.has_fitted_table else packed.spec.number_format.integer_multiplier
    if codes.dtype == torch.int8 and integers is not None:
        return (table * integers).round().to(torch.int8), integers, int8_product
    if codes.dtype == torch.bfloat16 and bool((table.bfloat16().float() == table).all()) and _sums_in_float32(codes):
        return table.bfloat16(), 1, _cuda_bfloat16_product
    exact = dtype != torch.float16 and bool((table.to(dtype).float() == table).all())
    return table.to(dtype if exact else torch.float32), 1, torch.nn.functional.linear


def _sums_in_float32(codes: Tensor) -> bool:
    """Whether torch multiplies bfloat16 there by units for it and returns their float32 sums."""
    return codes.device.type == "cuda" and has_bfloat16_units(codes.device)


def _cuda_bfloat16_product(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 ``[m, k]`` times the transpose of ``[n, k]``, summed in float32: products of so few bits are exact."""
    return torch.mm(a, b.t(), out_dtype=torch.float32)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 ``[m, k]`` times the transpose of int8 ``[n, k]``: exact integers, as int32 or as float32."""
    if a.shape[1] == 1:  # torch 2.13's int8 product of one column returns what happens to lie in memory
        return a.int() * b.int().t()
    if a.device.type == "cuda" and not (a.shape[1] | b.shape[0]) % _CUDA_MULTIPLE:
        return _cuda_int8_product(a, b)
    if a.device.type == "cpu" and has_int8_dot():
        return torch._int_mm(a.contiguous(), b.t().contiguous())
    if a.shape[1] <= _EXACT_FLOAT_WIDTH:
        return torch.nn.functional.linear(a.float(), b.float())
    slices = zip(a.split(_EXACT_FLOAT_WIDTH, dim=1), b.split(_EXACT_FLOAT_WIDTH, dim=1), strict=True)
    sums = [torch.nn.functional.linear(x.float(), y.float()).int() for x, y in slices]
    return torch.stack(sums).sum(0, dtype=torch.int32)


def _cuda_int8_product(a: Tensor, b: Tensor) -> Tensor:
    """With the second matrix as it lies, column by column, and rows of zeros up to a number that the library takes."""
    rows = a.shape[0]
    wanted = max(_CUDA_LEAST_ROWS, -(-rows // _CUDA_MULTIPLE) * _CUDA_MULTIPLE)
    padded = torch.nn.functional.pad(a, (0, 0, 0, wanted - rows)).contiguous()
    return torch._int_mm(padded, b.contiguous().t())[:rows]
