"""The native product of few tokens, by addresses: a token of a small model takes no more time than Python around it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.matrix import Matrix
from hf_lowbit.kernels.cpu.products import FLOAT_TYPES, _addresses, _check, _library


def prepare(x: Tensor, matrices: Sequence[Matrix]) -> Callable[[Tensor], list[Tensor]]:
    """:func:`hf_lowbit.kernels.cpu.linear` for contiguous inputs ``[..., columns]`` of the shape and type of x."""
    columns, count, kind = x.shape[-1], len(matrices), FLOAT_TYPES[x.dtype]
    shapes, tokens = [(*x.shape[:-1], matrix.rows) for matrix in matrices], x.numel() // columns
    multiply, threads = _library().hfl_linear, torch.get_num_threads
    described = tuple(matrices), _addresses([matrix.address for matrix in matrices])
    pointers = ctypes.c_void_p * count

    def product(x: Tensor) -> list[Tensor]:
        results = [x.new_empty(*shape) for shape in shapes]
        to = pointers(*[result.data_ptr() for result in results])
        if status := multiply(described[1], count, x.data_ptr(), kind, tokens, columns, to, threads()):
            _check(status)
        return results

    return product
