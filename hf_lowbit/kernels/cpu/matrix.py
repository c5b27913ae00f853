"""A packed tensor as the native kernels see it: pointers and numbers."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.formats.packed import table_of

SCALE_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_TABLE, _INTEGER, _MINIFLOAT = 0, 1, 2


class MatrixStruct(ctypes.Structure):
    """``hfl_matrix`` of lowbit.h, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table")]
        + [(name, ctypes.c_int64) for name in ("rows", "columns", "words", "groups")]
        + [(name, ctypes.c_int32) for name in ("bits", "packing", "decoder", "scale_type", "zero_kind", "one_scale")]
        + [(name, ctypes.c_int32) for name in ("exponent_bits", "integer_multiplier")]
        + [(name, ctypes.c_float) for name in ("integer_offset", "minifloat_factor")]
    )


class Matrix:
    """A packed matrix ``[rows, columns]`` on the CPU, by pointers: the packed tensor must outlive its use."""

    def __init__(self, packed: PackedTensor) -> None:
        self.spec, self.rows, self.columns = packed.spec, packed.weight.shape[0], packed.columns
        self.table = table_of(packed)
        decoder = _Decoder() if packed.spec.has_fitted_table else _decoder(packed.spec)
        zero = 0 if packed.zero_point is None else 2 if packed.spec.has_integer_zero_point else 1
        self.struct = MatrixStruct(
            codes=packed.weight.data_ptr(),
            scales=packed.scale.data_ptr(),
            zeros=None if packed.zero_point is None else packed.zero_point.data_ptr(),
            table=self.table.data_ptr(),
            rows=self.rows,
            columns=self.columns,
            words=packed.weight.shape[1],
            groups=packed.scale.shape[-1],
            bits=packed.spec.bits,
            packing=1 if packed.spec.packing == "base3" else 0,
            decoder=decoder.kind,
            scale_type=SCALE_TYPES[packed.spec.scale_dtype],
            zero_kind=zero,
            one_scale=int(packed.scale.shape[0] == 1 and self.rows > 1),
            exponent_bits=decoder.exponent_bits,
            integer_multiplier=decoder.integer_multiplier,
            integer_offset=decoder.offset,
            minifloat_factor=decoder.factor,
        )
        self.address = ctypes.addressof(self.struct)
        self.alone = (ctypes.c_void_p * 1)(self.address)  # a list of matrices: this one; making it takes a microsecond


_described: dict[tuple[int, ...], Matrix] = {}
_MOST_DESCRIBED = 1 << 16


def describe(packed: PackedTensor) -> Matrix | None:
    """The native view of a packed matrix; None if it is not a contiguous one in CPU memory.

    Remembered by address: a description holds addresses and sizes only, so it stays true of whatever lies there.
    """
    weight, scale, zero_point, table = packed.weight, packed.scale, packed.zero_point, packed.table
    if weight.device.type != "cpu" or weight.dim() != 2 or not (weight.is_contiguous() and scale.is_contiguous()):
        return None
    if zero_point is not None and not zero_point.is_contiguous():
        return None
    key = (
        weight.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if table is None else table.data_ptr(),
        weight.shape[0],
        scale.shape[0],
        packed.columns,
        id(packed.spec),  # alive as long as the description that holds it
    )
    matrix = _described.get(key)
    if matrix is None:
        if len(_described) >= _MOST_DESCRIBED:
            _described.clear()
        matrix = _described[key] = Matrix(packed)
    return matrix


@dataclass(frozen=True)
class _Decoder:
    """How codes become values: by table, or by arithmetic that gives exactly the table's values."""

    kind: int = _TABLE
    exponent_bits: int = 0
    offset: float = 0.0
    factor: float = 1.0
    integer_multiplier: int = 0


@lru_cache(maxsize=256)
def _decoder(spec: WeightSpec) -> _Decoder:
    number_format = spec.number_format
    table, multiplier = number_format.table, number_format.integer_multiplier or 0
    codes = torch.arange(len(table))
    if torch.equal(table, codes + table[0]) and float(table[0]) == -len(table) / 2:
        return _Decoder(_INTEGER, offset=float(table[0]), integer_multiplier=multiplier)
    for exponent_bits in range(1, spec.bits):
        factor = _minifloat_factor(table, exponent_bits)
        if factor is not None:
            return _Decoder(_MINIFLOAT, exponent_bits, factor=factor, integer_multiplier=multiplier)
    return _Decoder(integer_multiplier=multiplier)


def _minifloat_factor(table: Tensor, exponent_bits: int) -> float | None:
    """The power of two that turns sign, exponent and mantissa bits, put where float32 has them, into the table.

    Codes of infinity and NaN are never produced by encoding and do not count.
    """
    bits = (len(table) - 1).bit_length()
    codes = torch.arange(len(table), dtype=torch.int64)
    magnitude = (codes & (len(table) // 2 - 1)) << (32 - bits) >> (8 - exponent_bits)
    raw = magnitude.to(torch.int32).view(torch.float32)
    sign = torch.where(codes >= len(table) // 2, -1.0, 1.0)
    usable = torch.isfinite(table) & (table != 0)
    if not bool(usable.any()) or float(raw[usable][-1]) == 0:
        return None
    factor = float(table[usable][-1] / (sign * raw)[usable][-1])
    finite = torch.isfinite(table)
    exact = torch.equal((raw * factor * sign)[finite] + 0.0, table[finite] + 0.0)
    return factor if exact else None
