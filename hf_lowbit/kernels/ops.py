"""The products as torch custom operators: what torch.compile and torch.export see instead of their insides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.formats.packed import with_plain_scales
from hf_lowbit.kernels import cpu, products
from hf_lowbit.kernels.described import read_activation, read_weight, read_weights, told
from hf_lowbit.kernels.routes import NATIVE_TOKENS_FAST_TYPE

_PACKED = "Tensor weight, Tensor scale, Tensor? zero_point, Tensor? table, str spec, int columns"
_library = torch.library.Library("hf_lowbit", "DEF")
_INPUTS = "str? activation, Tensor? input_scale, Tensor? input_shift, Tensor? sums"
_library.define(f"linear(Tensor x, {_PACKED}, {_INPUTS}, str? backend) -> Tensor")
_SEVERAL = "Tensor x, Tensor[] stored, str specs, int columns, str activation"
_OF_SEVERAL = f"({_SEVERAL}) -> Tensor"  # one product after the other, flat; no activation: inputs as they are
_library.define(f"products{_OF_SEVERAL}")  # without gradients, inputs that bring their scales; on a CPU native
_library.define(f"products_of_python{_OF_SEVERAL}")  # what the native one leaves
_library.define(f"linear_backward(Tensor gradient, {_PACKED}, str? backend) -> Tensor")
_library.define(f"decode({_PACKED}, ScalarType dtype, str? backend) -> Tensor")
_library.define(f"rows({_PACKED}, Tensor index, ScalarType dtype, str? backend) -> Tensor")

PRODUCTS = torch.ops.hf_lowbit.products.default


def packed_linear(
    x: Tensor,
    packed: PackedTensor,
    activation: ActivationSpec | None,
    backend: str | None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """:func:`hf_lowbit.kernels.packed_linear` as an operator."""
    brings_scales = activation is None or activation.brings_scales
    if backend is None and torch.compiler.is_compiling() and not torch.is_grad_enabled() and brings_scales:
        return inference_product(x, packed, activation)
    text = None if activation is None else told(activation)
    inputs = text, input_scale, input_shift, sums
    result: Tensor = torch.ops.hf_lowbit.linear(x, *_arguments(packed), *inputs, backend)
    return result


def inference_product(x: Tensor, packed: PackedTensor, activation: ActivationSpec | None = None) -> Tensor:
    """The same where no gradient is needed and inputs bring their scales: graphs can join such products."""
    packed = with_plain_scales(packed)
    specs, inputs = f"[{told(packed.spec)}]", "" if activation is None else told(activation)
    result: Tensor = torch.ops.hf_lowbit.products(x, _stored(packed), specs, packed.columns, inputs)
    return result.view(*x.shape[:-1], packed.weight.shape[0])


def decode_matrix(packed: PackedTensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """The decoded matrix as an operator."""
    result: Tensor = torch.ops.hf_lowbit.decode(*_arguments(packed), dtype, backend)
    return result


def look_up_rows(packed: PackedTensor, index: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """Decoded rows as an operator."""
    result: Tensor = torch.ops.hf_lowbit.rows(*_arguments(packed), index, dtype, backend)
    return result


def _stored(packed: PackedTensor) -> list[Tensor]:
    parts = (packed.weight, packed.scale, packed.zero_point, packed.table)
    return [part for part in parts if part is not None]


def _matrices(stored: Sequence[Tensor], specs: str, columns: int) -> list[PackedTensor]:
    """From the tensors of several matrices, and their specs as a list in JSON."""
    parts, matrices = iter(stored), []
    for spec in read_weights(specs):
        weight, scale = next(parts), next(parts)
        zero_point = None if spec.symmetric else next(parts)
        matrices.append(
            PackedTensor(weight, scale, spec, columns, zero_point, next(parts) if spec.has_fitted_table else None)
        )
    return matrices


def _arguments(packed: PackedTensor) -> tuple[Any, ...]:
    packed = with_plain_scales(packed)  # traced code: operators see plain scales only
    return packed.weight, packed.scale, packed.zero_point, packed.table, told(packed.spec), packed.columns


def _packed(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, spec: str, columns: int
) -> PackedTensor:
    return PackedTensor(weight, scale, read_weight(spec), columns, zero_point, table)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, *arguments: Any) -> Tensor:
    *packed, activation, input_scale, input_shift, sums, backend = arguments
    spec = None if activation is None else read_activation(activation)
    return products.product(x, _packed(*packed), spec, backend, input_scale, input_shift, sums)


@torch.library.impl(_library, "products", "CompositeExplicitAutograd")
@torch.library.impl(_library, "products_of_python", "CompositeExplicitAutograd")
def _products(x: Tensor, stored: list[Tensor], specs: str, columns: int, activation: str) -> Tensor:
    matrices, spec = _matrices(stored, specs, columns), read_activation(activation)
    if x.device.type == "cpu":
        cpu.serve(matrices, spec, cpu.Described(specs=specs, activation=activation), NATIVE_TOKENS_FAST_TYPE)
    return products.flat_products(x, matrices, spec)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(gradient: Tensor, *arguments: Any) -> Tensor:
    *packed, backend = arguments
    return products.input_gradient(gradient, _packed(*packed), backend)


@torch.library.impl(_library, "decode", "CompositeExplicitAutograd")
def _decode(*arguments: Any) -> Tensor:
    *packed, dtype, backend = arguments
    return products.decode_matrix(_packed(*packed), dtype, backend)


@torch.library.impl(_library, "rows", "CompositeExplicitAutograd")
def _rows(*arguments: Any) -> Tensor:
    *packed, index, dtype, backend = arguments
    return products.look_up_rows(_packed(*packed), index, dtype, backend)


@torch.library.register_fake("hf_lowbit::linear", lib=_library)
def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("hf_lowbit::products", lib=_library)
@torch.library.register_fake("hf_lowbit::products_of_python", lib=_library)
def _products_fake(x: Tensor, stored: list[Tensor], specs: str, columns: int, activation: str) -> Tensor:
    rows = sum(packed.weight.shape[0] for packed in _matrices(stored, specs, columns))
    return x.new_empty(math.prod(x.shape[:-1]) * rows)


@torch.library.register_fake("hf_lowbit::linear_backward", lib=_library)
def _linear_backward_fake(gradient: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], arguments[4])


@torch.library.register_fake("hf_lowbit::decode", lib=_library)
def _decode_fake(weight: Tensor, *arguments: Any) -> Tensor:
    *_, columns, dtype, _backend = arguments
    return weight.new_empty(*weight.shape[:-1], columns, dtype=dtype)


@torch.library.register_fake("hf_lowbit::rows", lib=_library)
def _rows_fake(weight: Tensor, *arguments: Any) -> Tensor:
    *_, columns, index, dtype, _backend = arguments
    return weight.new_empty(index.shape[0], columns, dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, zero_point, table, spec, columns, *_told, backend = inputs
    ctx.save_for_backward(weight, scale, zero_point, table)
    ctx.rest = (spec, columns, backend)


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    result = torch.ops.hf_lowbit.linear_backward(gradient, *ctx.saved_tensors, *ctx.rest)
    return (result, *[None] * 11)


torch.library.register_autograd("hf_lowbit::linear", _input_gradient, setup_context=_remember, lib=_library)
