"""Weights whose columns come in parts that are rounded each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, unpack_codes
from hf_lowbit.formats.packed import scales, zero_points
from hf_lowbit.rounding.grid import Grid, RoundingError
from hf_lowbit.rounding.store import to_packed


def round_parts(
    weight: Tensor, spec: WeightSpec, widths: Sequence[int], rounding: Callable[[Tensor, WeightSpec], PackedTensor]
) -> PackedTensor:
    """A weight in parts, each with one scale per row: ``rounding`` of the part alone.

    A stored group is at most as wide as every part divides into; the groups of a part repeat its scale.

    Args:
        weight: ``[rows, columns]``.
        spec: of the result; its group divides every part.
        widths: columns of the parts, in their order.
        rounding: for one part and a specification of one scale per row.

    Raises:
        RoundingError: parts that are not the columns, or that the group does not divide; a table fitted to each part.
    """
    group = spec.group_size
    if not isinstance(group, int) or sum(widths) != weight.shape[1] or math.gcd(*widths) % group:
        raise RoundingError(f"groups of {group} do not divide parts of {[*widths]} of {weight.shape[1]} columns")
    if spec.has_fitted_table:
        raise RoundingError("a codebook cannot be fitted to each part: give codebook=[...] or another format")
    row = replace(spec, group_size=None)
    parts = [rounding(part, row) for part in weight.split([*widths], dim=1)]
    codes = [unpack_codes(part.weight, spec.bits, part.columns, spec.packing) for part in parts]
    repeated = [Grid(*(value.expand(-1, part.columns // group) for value in _grid(part))) for part in parts]
    grid = Grid(*(torch.cat(values, 1) for values in zip(*repeated, strict=True)))
    return to_packed(torch.cat(codes, 1), grid, spec, spec.number_format)


def _grid(packed: PackedTensor) -> Grid:
    scale, zero_point = scales(packed), zero_points(packed)
    return Grid(scale, torch.zeros_like(scale) if zero_point is None else zero_point)
