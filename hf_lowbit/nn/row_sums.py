"""Sums of a packed weight, remembered as long as it stays what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import row_sums
from hf_lowbit.nn.graphs import outside_graphs

_Stamp = tuple[tuple[Tensor, int, int], ...]


class RowSums:
    """:func:`hf_lowbit.kernels.row_sums` of the parameters of one module. Copies and pickles of it are empty.

    They are computed anew where the codes or scales are other tensors, lie elsewhere, or were written to.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[_Stamp, Tensor]] = {}

    @outside_graphs
    def of(self, name: str, packed: PackedTensor, groups: int) -> Tensor:
        """float32 ``[..., rows, groups]``."""
        stamp = _stamp(packed)
        known = self._known.get((name, groups))
        if known is None or not _is_same(known[0], stamp):
            with torch.no_grad():
                known = self._known[name, groups] = stamp, row_sums(packed, groups)
        return known[1]

    def forget(self, name: str) -> None:
        """Those of one parameter."""
        self._known = {key: value for key, value in self._known.items() if key[0] != name}

    def __deepcopy__(self, memo: dict[int, Any]) -> RowSums:
        return RowSums()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowSums, ()


def _stamp(packed: PackedTensor) -> _Stamp:
    tensors = (tensor for tensor in packed.tensors().values())
    return tuple((tensor, 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in tensors)


def _is_same(known: _Stamp, now: _Stamp) -> bool:
    return len(known) == len(now) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(known, now, strict=True))
