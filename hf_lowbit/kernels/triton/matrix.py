"""A packed tensor as the Triton kernels see it, and which of them multiplies it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.formats.spec import SCALE_DTYPES
from hf_lowbit.kernels.triton.device import interpreted, runs_on
from hf_lowbit.kernels.triton.unpack import TABLE, Unpacking, codes_of_unit, scaled, unpacking, words_of_unit

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
_SLICE_UNITS = 16  # the shortest side of a product in the tensor cores
_WIDTHS = (1, 2, 3, 4, 6, 8)
_MOST_PARTS = 2  # one after another, the other's inputs zeros


@dataclass(frozen=True)
class Tiling:
    """How a row is cut for the fused kernel.

    Attributes:
        units: in a slice.
        group_slices, parts: slices of a group, or groups of a slice; 0 and 1 where a row is one group.
        scales_weights: slices of several groups are multiplied by their scales as they are unpacked.
    """

    units: int
    group_slices: int = 0
    parts: int = 1
    scales_weights: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """What is the same for all tensors of a specification and width: one object, known by its identity."""

    tiling: Tiling | None
    exact_tiling: Tiling | None  # whose scales multiply sums
    unpacking: Unpacking
    scaled: str | None  # instructions that multiply by scales, too; None: a table's values are
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
    fits = dtype in HALF_TYPES and float(table.abs().max()) <= torch.finfo(dtype).max
    exact_tiling = _tiling(spec, columns, dtype, False) if fits else None
    tiling = _tiling(spec, columns, dtype, True) if fits else None
    how, with_scales = _instructions(spec, dtype) if tiling is not None and not interpreted() else (TABLE, None)
    zero_kind = 0 if spec.symmetric else 2 if spec.has_integer_zero_point else 1
    offset = float(spec.number_format.table[0]) if spec.format == "int" and spec.bits > 1 else None
    is_exact = not spec.has_fitted_table and torch.equal(table.bfloat16().float(), table)
    return Layout(tiling, exact_tiling, how, with_scales, offset, zero_kind, is_exact)


def _tiling(spec: WeightSpec, columns: int, dtype: torch.dtype, scales_weights: bool) -> Tiling | None:
    """None where units split codes, or groups do not fit the fused kernel: rows are decoded first then.

    Args:
        scales_weights: where slices have several groups; where scales are not of ``dtype``, too, these do not.
    """
    groups, words = spec.groups(columns), words_of_unit(spec.bits)
    group = columns // groups
    if spec.packing != "dense" or spec.bits not in _WIDTHS:
        return None
    how, with_scales = _instructions(spec, dtype)
    codes = codes_of_unit(spec.bits)
    if columns % codes or (groups > 1 and group % codes) or (words and how == TABLE):
        return None
    sizes = (_SLICE_UNITS,) if words else (2 * _SLICE_UNITS, _SLICE_UNITS)
    if groups == 1:
        return Tiling(sizes[0])
    units = group // codes
    for size in sizes:
        if units % size == 0:
            return Tiling(size, units // size)
    can_scale = SCALE_DTYPES[spec.scale_dtype] == dtype and spec.symmetric and (how == TABLE or with_scales is not None)
    if scales_weights and can_scale:
        return Tiling(sizes[0], 1, sizes[0] // units, True) if sizes[0] % units == 0 else None
    parts = _SLICE_UNITS // units
    fits = not words and units * parts == _SLICE_UNITS and parts <= _MOST_PARTS
    return Tiling(_SLICE_UNITS, 1, parts) if fits else None


def _instructions(spec: WeightSpec, dtype: torch.dtype) -> tuple[Unpacking, str | None]:
    """How codes become values, and values times scales."""
    how, count = unpacking(spec, dtype), codes_of_unit(spec.bits)
    return how, scaled(how, count, count + (2 * words_of_unit(spec.bits) or 1), dtype)


@lru_cache(maxsize=256)
def _table(spec: WeightSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    with ThreadPoolExecutor(1) as outside:  # memory made while a CUDA graph is warmed up would be the graph's
        return outside.submit(spec.number_format.table.to, device, dtype).result()
