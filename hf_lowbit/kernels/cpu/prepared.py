"""The native product of few tokens, by addresses: a token of a small model takes no more time than Python around it.

Of a model that does not fit into the caches, everything that belongs to one product comes from memory for every token,
codes and objects of Python alike. So a product is one small object, and what it has in common with others is shared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.matrix import Matrix
from hf_lowbit.kernels.cpu.products import FLOAT_TYPES, _addresses, _check, _library

_Common = tuple[Callable[..., int], Callable[[], int], int, int, int]
_Pointer = ctypes.c_void_p * 1


def prepare(x: Tensor, matrices: Sequence[Matrix]) -> Callable[[Tensor], list[Tensor]]:
    """:func:`hf_lowbit.kernels.cpu.linear` for contiguous inputs ``[..., columns]`` of the shape and type of x."""
    common = _common(FLOAT_TYPES[x.dtype], x.numel() // x.shape[-1], x.shape[-1])
    shapes = _shapes(x.shape[:-1], tuple(matrix.rows for matrix in matrices))
    return (_Product if len(matrices) == 1 else _Products)(common, shapes, matrices)


@lru_cache(maxsize=1024)
def _common(kind: int, tokens: int, columns: int) -> _Common:
    return _library().hfl_linear, torch.get_num_threads, kind, tokens, columns


@lru_cache(maxsize=1024)
def _shapes(leading: tuple[int, ...], rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*leading, n) for n in rows]


class _Product:
    """Of one matrix, without the lists that several need."""

    __slots__ = ("_address", "_common", "_matrices", "_shape")

    def __init__(self, common: _Common, shapes: list[tuple[int, ...]], matrices: Sequence[Matrix]) -> None:
        self._common, (self._shape,) = common, shapes
        self._matrices = matrices  # they hold what lies at the address
        self._address = ctypes.addressof(matrices[0].alone)

    def __call__(self, x: Tensor) -> list[Tensor]:
        multiply, threads, kind, tokens, columns = self._common
        result = x.new_empty(*self._shape)
        to = _Pointer(result.data_ptr())
        if status := multiply(self._address, 1, x.data_ptr(), kind, tokens, columns, to, threads()):
            _check(status)
        return [result]


class _Products:
    """Of several matrices, in one call."""

    __slots__ = ("_address", "_common", "_matrices", "_pointers", "_shapes")

    def __init__(self, common: _Common, shapes: list[tuple[int, ...]], matrices: Sequence[Matrix]) -> None:
        self._common, self._shapes, self._pointers = common, shapes, ctypes.c_void_p * len(matrices)
        addresses = _addresses([matrix.address for matrix in matrices])
        self._matrices: Any = matrices, addresses  # they hold what lies at the address
        self._address = ctypes.addressof(addresses)

    def __call__(self, x: Tensor) -> list[Tensor]:
        multiply, threads, kind, tokens, columns = self._common
        results = [x.new_empty(*shape) for shape in self._shapes]
        to = self._pointers(*[result.data_ptr() for result in results])
        if status := multiply(self._address, len(results), x.data_ptr(), kind, tokens, columns, to, threads()):
            _check(status)
        return results
