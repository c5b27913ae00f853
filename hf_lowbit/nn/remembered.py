"""What is computed from tensors of a module, remembered as long as they stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_Stamp = tuple[tuple[Tensor, int, int, torch.dtype], ...]
_Value = TypeVar("_Value")


class Remembered(Generic[_Value]):
    """Values by key. They are made anew where a source is another tensor, lies elsewhere, or was written to.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[_Stamp, _Value]] = {}

    def of(self, key: Hashable, sources: Iterable[Tensor | None], make: Callable[[], _Value]) -> _Value:
        """The value of ``make``, which depends on nothing but the sources; without gradients."""
        tensors = [tensor for tensor in sources if tensor is not None]
        known = self._known.get(key)
        if known is None or not _is_same(known[0], tensors):
            stamp = tuple((t, _version(t), t.data_ptr(), t.dtype) for t in tensors)
            with torch.inference_mode(False), torch.no_grad():  # a later graph may save it
                known = self._known[key] = stamp, make()
        return known[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered[_Value]:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_same(known: _Stamp, tensors: list[Tensor]) -> bool:
    if len(known) != len(tensors):
        return False
    for (tensor, version, address, dtype), now in zip(known, tensors, strict=True):  # a loop: it runs for every token
        if now is not tensor or now.data_ptr() != address or _version(now) != version or now.dtype != dtype:
            return False
    return True
