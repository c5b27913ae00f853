"""What layers computed last of an input: the next token takes the same way, and nothing is looked for again."""

from __future__ import annotations

from collections.abc import Sequence
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

    __slots__ = ("_device", "_device_type", "_dtype", "_layers", "_product", "_shape")

    def __init__(self, layers: Sequence[PackedLinear], x: Tensor, product: Product) -> None:
        self._shape, self._dtype, self._device, self._device_type = x.shape, x.dtype, x.device, x.device.type
        self._product = product
        self._layers = [(layer.layer_spec, layer.backend, _places(layer)) for layer in layers]

    def of(self, layers: Sequence[PackedLinear], x: Tensor) -> list[Tensor] | None:
        """The products of the layers' codes with x; None where they may be others."""
        if (
            x.shape != self._shape
            or x.dtype is not self._dtype
            or x.device != self._device
            or not _is_plain(x, self._device_type)
        ):
            return None
        for layer, (spec, backend, places) in zip(layers, self._layers, strict=True):
            if layer.layer_spec is not spec or layer.backend != backend:
                return None
            stored: Any = layer._parameters
            for name, place in places:
                if stored[name].data_ptr() != place:
                    return None
        return self._product(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def last_product(layers: Sequence[PackedLinear], x: Tensor) -> LastProduct | None:
    """To be asked after products of layers of one backend with x; None where there is nothing to know."""
    if x.numel() > MOST_TOKENS * x.shape[-1] or any(layer.layer_spec.activation is not None for layer in layers):
        return None
    if not _is_plain(x, x.device.type):
        return None
    product = known_products(x, [layer.packed() for layer in layers], layers[0].backend)
    return None if product is None else LastProduct(layers, x, product)


def _places(layer: PackedLinear) -> list[tuple[str, int]]:
    names = [f"weight{suffix}" for suffix in layer.packed().tensors()]
    return [(name, layer.get_parameter(name).data_ptr()) for name in names]


def _is_plain(x: Tensor, device_type: str) -> bool:
    plain = x.is_contiguous() and not x.requires_grad and is_untouched(x)
    return plain and not torch.is_autocast_enabled(device_type)
