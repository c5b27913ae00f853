"""What a linear layer computed last: the next token takes the same way, and nothing is looked for again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lowbit.kernels import Product, is_eager, known_products

if TYPE_CHECKING:
    from hf_lowbit.nn.linear import PackedLinear


class LastProduct:
    """A layer's product with an input, known but for the values of the input.

    It holds for inputs of the same shape, type and device, while the layer's codes and companions lie where they lay,
    and its format and backend are what they were. That is asked at every call: nobody has to tell of a change. What
    needs a gradient, an operator or a cast goes the long way. Copies and pickles of it are None.
    """

    __slots__ = ("_backend", "_device", "_dtype", "_places", "_product", "_shape", "_spec")

    def __init__(self, layer: PackedLinear, x: Tensor, product: Product) -> None:
        self._shape, self._dtype, self._device, self._product = x.shape, x.dtype, x.device, product
        self._spec, self._backend = layer.layer_spec, layer.backend
        names = [f"weight{suffix}" for suffix in layer.packed().tensors()]
        self._places = [(name, layer.get_parameter(name).data_ptr()) for name in names]

    def of(self, layer: PackedLinear, x: Tensor) -> Tensor | None:
        """The product of the layer's codes with x; None where it may be another one."""
        if (
            x.shape != self._shape
            or x.dtype is not self._dtype
            or x.device != self._device
            or layer.layer_spec is not self._spec
            or layer.backend != self._backend
            or not _is_plain(x)
        ):
            return None
        stored: Any = layer._parameters
        for name, place in self._places:
            tensor = stored[name]
            if tensor.data_ptr() != place or not tensor.is_contiguous():
                return None
        return self._product(x)[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def last_product(layer: PackedLinear, x: Tensor) -> LastProduct | None:
    """To be asked after a product with x; None where there is nothing to know."""
    if layer.layer_spec.activation is not None or not _is_plain(x):
        return None
    product = known_products(x, (layer.packed(),), layer.backend)
    return None if product is None else LastProduct(layer, x, product)


def _is_plain(x: Tensor) -> bool:
    plain = x.is_contiguous() and not x.requires_grad and is_eager(x)
    return plain and not torch.is_autocast_enabled(x.device.type)
