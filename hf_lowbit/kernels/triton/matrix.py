"""A packed tensor as the Triton kernels see it, and which of them multiplies it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.kernels.triton.device import interpreted, runs_on
from hf_lowbit.kernels.triton.unpack import CHUNK_BITS, TABLE, Unpacking, unpacking

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALF_TYPES = (torch.bfloat16, torch.float16)
_SLICE_CHUNKS = 16  # the shortest side of a product in the tensor cores
_MOST_PARTS = 2


@dataclass(frozen=True)
class Tiling:
    """How a row is cut for the fused kernel.

    Attributes:
        chunks: in a slice.
        group_slices, parts: slices of a group, or groups of a slice; 0 and 1 where a row is one group.
    """

    chunks: int
    group_slices: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Layout:
    """What is the same for all tensors of a specification and width."""

    tiling: Tiling | None
    unpacking: Unpacking
    offset: float | None  # of consecutive integers: the first value
    zero_kind: int
    is_exact: bool  # bfloat16 holds its values


@dataclass
class Matrix:
    """A packed matrix ``[rows, columns]`` on a GPU."""

    packed: PackedTensor
    layout: Layout

    @property
    def rows(self) -> int:
        return self.packed.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.packed.columns

    def table(self, dtype: torch.dtype) -> Tensor:
        """``[2^bits]`` in a type."""
        if self.packed.table is not None:
            return self.packed.table.view(torch.float32).to(dtype)
        return _table(self.packed.spec, self.packed.weight.device, dtype)


def describe(packed: PackedTensor, dtype: torch.dtype) -> Matrix | None:
    """The view for inputs of ``dtype``; None where kernels do not run, or tensors lie otherwise than they read them."""
    weight = packed.weight
    if dtype not in FLOAT_TYPES or weight.dim() != 2 or not runs_on(weight.device) or not weight.is_contiguous():
        return None
    others = (packed.scale, packed.zero_point)
    if not all(part is None or part.is_contiguous() for part in others) or packed.scale_range is not None:
        return None
    return Matrix(packed, _layout(packed.spec, packed.columns, dtype))


@lru_cache(maxsize=1024)
def _layout(spec: WeightSpec, columns: int, dtype: torch.dtype) -> Layout:
    table = torch.zeros(1) if spec.has_fitted_table else spec.number_format.table
    table = table[torch.isfinite(table)]
    fits = dtype in _HALF_TYPES and float(table.abs().max()) <= torch.finfo(dtype).max
    tiling = _tiling(spec, columns) if fits else None
    instructions = TABLE if tiling is None or interpreted() else unpacking(spec, dtype)
    zero_kind = 0 if spec.symmetric else 2 if spec.has_integer_zero_point else 1
    offset = float(spec.number_format.table[0]) if spec.format == "int" and spec.bits > 1 else None
    is_exact = not spec.has_fitted_table and torch.equal(table.bfloat16().float(), table)
    return Layout(tiling, instructions, offset, zero_kind, is_exact)


def _tiling(spec: WeightSpec, columns: int) -> Tiling | None:
    """None where chunks split codes, or groups do not fit the fused kernel: rows are decoded first then."""
    groups = spec.groups(columns)
    group = columns // groups
    if spec.packing != "dense" or CHUNK_BITS % spec.bits:
        return None
    codes = CHUNK_BITS // spec.bits
    if columns % codes or (groups > 1 and group % codes):
        return None
    if groups == 1:
        return Tiling(2 * _SLICE_CHUNKS)
    chunks = group // codes
    for size in (2 * _SLICE_CHUNKS, _SLICE_CHUNKS):
        if chunks % size == 0:
            return Tiling(size, chunks // size)
    if _SLICE_CHUNKS % chunks == 0 and _SLICE_CHUNKS // chunks <= _MOST_PARTS:
        return Tiling(_SLICE_CHUNKS, 1, _SLICE_CHUNKS // chunks)
    return None


@lru_cache(maxsize=256)
def _table(spec: WeightSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    return spec.number_format.table.to(device, dtype)
