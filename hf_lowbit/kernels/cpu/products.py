"""The native products, on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.library import load
from hf_lowbit.kernels.cpu.matrix import Matrix

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VALUE_TYPES = {**FLOAT_TYPES, torch.int8: 3}


def linear(x: Tensor, matrices: Sequence[Matrix]) -> list[Tensor]:
    """x ``[m, columns]`` times each packed matrix, float32 accumulation, results ``[m, rows]`` in x's type.

    One call reads the inputs once and shares the rows of all matrices among torch's threads.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, dtype = x.shape[0], x.dtype
    results = [torch.empty((m, matrix.rows), dtype=dtype) for matrix in matrices]
    status = _library().hfl_linear(
        matrices[0].alone if len(matrices) == 1 else _addresses([matrix.address for matrix in matrices]),
        len(matrices),
        x.data_ptr(),
        FLOAT_TYPES[dtype],
        m,
        x.stride(0),
        _addresses([result.data_ptr() for result in results]),
        torch.get_num_threads(),
    )
    _check(status)
    return results


def linear_int8(codes: Tensor, scale: Tensor, matrices: Sequence[Matrix], dtype: torch.dtype) -> list[Tensor]:
    """int8 codes ``[m, columns]`` of -127..127 with float32 scales ``[m, groups]`` times each packed integer matrix.

    Inputs have one group, or as many as each of the matrices. Integer sums within a group, scaled in float32; results
    ``[m, rows]`` in ``dtype``.
    """
    codes, scale = codes.contiguous(), scale.contiguous()
    m = codes.shape[0]
    results = [torch.empty(m, matrix.rows, dtype=dtype) for matrix in matrices]
    status = _library().hfl_linear_int8(
        _addresses([matrix.address for matrix in matrices]),
        len(matrices),
        codes.data_ptr(),
        scale.data_ptr(),
        scale.shape[1],
        m,
        FLOAT_TYPES[dtype],
        _addresses([result.data_ptr() for result in results]),
        torch.get_num_threads(),
    )
    _check(status)
    return results


def multiplies_int8(matrix: Matrix) -> bool:
    """Whether :func:`linear_int8` takes this matrix: integer table, fitting groups, sums that its numbers hold."""
    return bool(_library().hfl_multiplies_int8(matrix.address))


def multiplies_in_registers(matrix: Matrix) -> bool:
    """Whether :func:`linear` decodes this layout in registers, or a row at a time, several times slower."""
    return bool(_library().hfl_multiplies_in_registers(matrix.address))


def multiplies_many(matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether :func:`linear`, of int8 :func:`linear_int8`, decodes once for many inputs of this type."""
    return bool(_library().hfl_multiplies_many(matrix.address, VALUE_TYPES[dtype]))


def decode_rows(matrix: Matrix, rows: slice | Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decoded rows ``[n, columns]``, equal to the torch reference to the last bit; into ``out`` if it is given.

    Raises:
        IndexError: a row that the matrix does not have.
    """
    index = None
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(matrix.rows)
        n = max(0, stop - start)
    else:
        index = rows.to(torch.int64).contiguous()
        start, n = 0, index.numel()
    if out is None:
        out = torch.empty(n, matrix.columns, dtype=dtype)
    status = _library().hfl_decode(
        matrix.address,
        None if index is None else index.data_ptr(),
        start,
        n,
        out.data_ptr(),
        FLOAT_TYPES[dtype],
        torch.get_num_threads(),
    )
    if status and index is not None:
        raise IndexError(f"index out of range for {matrix.rows} rows")
    _check(status)
    return out


def read_bytes(tensor: Tensor) -> int:
    """Reads all of a contiguous CPU tensor once, on torch's threads; the sum is only there to be used."""
    size = tensor.numel() * tensor.element_size()
    total: int = _library().hfl_read(tensor.data_ptr(), size, torch.get_num_threads())
    return total


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None  # callers ask available() first
    return library


def _addresses(values: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(values))(*values)


def _check(status: int) -> None:
    if status:
        raise ValueError("the native kernel refused its arguments")
