"""Operators of compiled graphs served natively: Python around the product of one token takes longer than the product.

The native library implements them with torch's stable C interface, whose functions it is given by address. It takes
what Python has described to it once; the rest goes to operators in Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.kernels.cpu.library import load
from hf_lowbit.kernels.cpu.matrix import describe
from hf_lowbit.kernels.cpu.products import multiplies_int8

# hfl_torch of lowbit.h, in its order.
_FUNCTIONS = (
    *("aoti_torch_library_init_impl", "torch_library_impl", "torch_call_dispatcher", "torch_get_num_threads"),
    *(f"aoti_torch_get_{what}" for what in ("data_ptr", "sizes", "dim", "numel", "dtype", "device_type")),
    *("aoti_torch_is_contiguous", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object"),
    *("torch_list_size", "torch_list_get_item", "torch_delete_list"),
    *("torch_string_length", "torch_string_c_str", "torch_delete_string"),
    *(f"aoti_torch_dtype_{name}" for name in ("float32", "bfloat16", "float16")),
)
_WHAT = "torch_exception_get_what_without_backtrace"  # since torch 2.13
_tables: dict[int, Tensor] = {}  # of formats, by address: they stay as long as the library may read them


class _TorchStruct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*_FUNCTIONS, _WHAT)] + [("most_tokens", ctypes.c_int64)]


@dataclass(frozen=True)
class Described:
    """What an operator's arguments say of matrices that are multiplied together.

    Attributes:
        specs: a text that describes them, of ``hf_lowbit::products``.
        numbers: of matrices that are kept, of ``hf_lowbit::kept_products``.
        activation: a text that describes what inputs become first; empty: they stay as they are.
    """

    specs: str = ""
    numbers: tuple[int, ...] = ()
    activation: str = ""


def serve(
    matrices: Sequence[PackedTensor], activation: ActivationSpec | None, arguments: Described, most_tokens: int
) -> bool:
    """Have the operator computed natively for CPU inputs and these matrices together from now on.

    Args:
        activation: what inputs become first: symmetric integers with scales of their own.
        arguments: how the operator is told of them.
        most_tokens: for more, native products are those that decode once for many.

    Returns:
        False where this torch or the native library cannot, matrices do not lie as kernels read them, or their
        integers have other groups than the inputs'.
    """
    library = load()
    if library is None or not _register(most_tokens):
        return False
    described = [matrix for packed in matrices if (matrix := describe(packed)) is not None]
    if len(described) < len(matrices):
        return False
    limit, groups = 0, 1
    if activation is not None:
        limit, groups = int(activation.limit), activation.groups(matrices[0].columns)
        if not all(multiplies_int8(matrix) and groups in (1, matrix.struct.groups) for matrix in described):
            return False
    has_table = [packed.table is not None for packed in matrices]
    for matrix, has in zip(described, has_table, strict=True):
        if not has:
            _tables[matrix.table.data_ptr()] = matrix.table
    count = len(described)
    addresses = (ctypes.c_void_p * count)(*(matrix.address for matrix in described))
    numbers = (ctypes.c_int64 * count)(*arguments.numbers) if arguments.numbers else None
    texts = arguments.specs.encode(), numbers, arguments.activation.encode()
    library.hfl_know(addresses, (ctypes.c_int * count)(*has_table), count, *texts, limit, groups)
    return True


def forget(number: int) -> None:
    """Matrices that were kept by this number, alone or with others, may go."""
    library = load()
    if library is not None:
        library.hfl_forget(number)


@cache
def _register(most_tokens: int) -> bool:
    library, torch_library = load(), _torch_library()
    if library is None or torch_library is None:
        return False
    try:
        addresses = [_address(getattr(torch_library, function)) for function in _FUNCTIONS]
    except AttributeError:  # a torch without them
        return False
    what = getattr(torch_library, _WHAT, None)
    functions = _TorchStruct(*addresses, None if what is None else _address(what), most_tokens)
    status: int = library.hfl_register_operators(ctypes.byref(functions))
    return status == 0


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _torch_library() -> ctypes.CDLL | None:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None
