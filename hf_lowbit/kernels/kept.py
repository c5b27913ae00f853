"""Matrices that compiled graphs know by numbers.

What they store is then no input of a graph, which would have to be handed over and looked at before every token.
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.formats.packed import with_plain_scales
from hf_lowbit.kernels import cpu, products
from hf_lowbit.kernels.described import read_activation, told
from hf_lowbit.kernels.routes import NATIVE_TOKENS_FAST_TYPE

_library = torch.library.Library("hf_lowbit", "FRAGMENT")
_SCHEMA = "(Tensor x, int[] numbers, int rows, str activation) -> Tensor"  # as hf_lowbit::products has its results
_library.define(f"kept_products{_SCHEMA}")
_library.define(f"kept_products_of_python{_SCHEMA}")

KEPT_PRODUCTS = torch.ops.hf_lowbit.kept_products.default

_kept: dict[int, PackedTensor] = {}
_numbers = itertools.count()


class KeptMatrix:
    """A packed matrix that goes by a number as long as this lives.

    Copies and pickles of it are None.

    Attributes:
        number: of this process.
        rows: of the matrix.
    """

    def __init__(self, packed: PackedTensor) -> None:
        self.number, self.rows = next(_numbers), packed.weight.shape[0]
        self._places = _places(packed)
        _kept[self.number] = _held(with_plain_scales(packed))
        weakref.finalize(self, _forget, self.number)

    def is_of(self, packed: PackedTensor) -> bool:
        """Whether that lies where this was made of it."""
        return _places(packed) == self._places

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def kept_product(x: Tensor, kept: KeptMatrix, activation: ActivationSpec | None) -> Tensor:
    """x ``[..., columns]`` times the matrix, ``[..., rows]``, for code that is compiled without gradients.

    Args:
        activation: what inputs become first; integers that bring their scales.
    """
    text = "" if activation is None else told(activation)
    result: Tensor = torch.ops.hf_lowbit.kept_products(x, [kept.number], kept.rows, text)
    return result.view(*x.shape[:-1], kept.rows)


def _held(packed: PackedTensor) -> PackedTensor:
    """Tensors of its own: parameters can come to lie elsewhere, and what they have left is freed."""
    parts = (packed.zero_point, packed.table)
    zero_point, table = (None if part is None else part.detach() for part in parts)
    return replace(
        packed, weight=packed.weight.detach(), scale=packed.scale.detach(), zero_point=zero_point, table=table
    )


def _places(packed: PackedTensor) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in packed.tensors().items()}


def _forget(number: int) -> None:
    del _kept[number]
    cpu.forget(number)


@torch.library.impl(_library, "kept_products", "CompositeExplicitAutograd")
@torch.library.impl(_library, "kept_products_of_python", "CompositeExplicitAutograd")
def _kept_products(x: Tensor, numbers: list[int], rows: int, activation: str) -> Tensor:
    if any(number not in _kept for number in numbers):
        raise RuntimeError("the weights of this compiled graph are no more: compile the model that has them now again")
    matrices, spec = [_kept[number] for number in numbers], read_activation(activation)
    if x.device.type == "cpu":
        arguments = cpu.Described(numbers=tuple(numbers), activation=activation)
        cpu.serve(matrices, spec, arguments, NATIVE_TOKENS_FAST_TYPE)
    return products.flat_products(x, matrices, spec)


@torch.library.register_fake("hf_lowbit::kept_products", lib=_library)
@torch.library.register_fake("hf_lowbit::kept_products_of_python", lib=_library)
def _kept_products_fake(x: Tensor, numbers: list[int], rows: int, activation: str) -> Tensor:
    return x.new_empty(math.prod(x.shape[:-1]) * rows)
