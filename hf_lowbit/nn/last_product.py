"""What layers computed last of an input: the next token takes the same way, and nothing is looked for again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowbit.kernels import MOST_TOKENS, Product, is_untouched, known_products

if TYPE_CHECKING:
    from hf_lowbit.nn.linear import PackedLinear


class LastProduct:
    """The products of a layer, or of layers that compute together, known but for the values of their input.

    It holds for inputs of the same shape, type and device, while the layers' codes and companions lie where they lay,
    and their formats and backends are what they were. That is asked at every call: nobody has to tell of a change. What
    needs a gradient, an operator or a cast goes the long way. Nothing of it is for code that is compiled. Copies and
    pickles of it are None.
    """

    __slots__ = ("_backend", "_inputs", "_names", "_places", "_product", "_specs")

    def __init__(self, layers: Sequence[PackedLinear], x: Tensor, product: Product) -> None:
        self._inputs, self._backend, self._product = _shared(_inputs(x)), layers[0].backend, product
        self._specs = tuple(layer.layer_spec for layer in layers)
        self._names = _shared(tuple(tuple(_stored(layer)) for layer in layers))
        self._places = [place for layer in layers for place in _stored(layer).values()]

    def of(self, layers: Sequence[PackedLinear], x: Tensor) -> list[Tensor] | None:
        """The products of the layers' codes with x; None where they may be others."""
        if _inputs(x) != self._inputs or not _is_plain(x):
            return None
        places, backend = [], self._backend
        for layer, spec, names in zip(layers, self._specs, self._names, strict=True):
            if layer.layer_spec is not spec or layer.backend != backend:
                return None
            stored: Any = layer._parameters
            for name in names:
                places.append(stored[name].data_ptr())
        return self._product(x) if places == self._places else None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def last_product(layers: Sequence[PackedLinear], x: Tensor) -> LastProduct | None:
    """To be asked after products of layers of one backend with x; None where there is nothing to know."""
    if x.numel() > MOST_TOKENS * x.shape[-1] or any(layer.layer_spec.activation is not None for layer in layers):
        return None
    if not _is_plain(x):
        return None
    product = known_products(x, [layer.packed() for layer in layers], layers[0].backend)
    return None if product is None else LastProduct(layers, x, product)


def _stored(layer: PackedLinear) -> dict[str, int]:
    """Where codes and companions lie, by the names of the parameters."""
    return {f"weight{suffix}": tensor.data_ptr() for suffix, tensor in layer.packed().tensors().items()}


def _inputs(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device


@lru_cache(maxsize=1024)
def _shared(value: tuple[Any, ...]) -> tuple[Any, ...]:
    return value


def _is_plain(x: Tensor) -> bool:
    plain = x.is_contiguous() and not x.requires_grad and is_untouched(x)
    return plain and not torch._C._is_any_autocast_enabled()
