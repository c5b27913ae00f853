"""Learned ranges: what two factors per group make of the grid that round to nearest would use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec
from hf_lowbit.formats.packed import scales, zero_points
from hf_lowbit.rounding.grid import Grid, fit_grid, is_laid_on_the_range, nonzero
from hf_lowbit.rounding.learned.functions import rounded, stored
from hf_lowbit.rounding.learned.levels import Levels


class Range(NamedTuple):
    """float32 ``[n, groups]``: the weights that the lowest and the highest level stand for; symmetric: -+ the scale."""

    low: Tensor
    high: Tensor


def base_grid(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, start: PackedTensor | None) -> Grid:
    """The grid of a packed tensor, or else round to nearest's. Raises RoundingError for NaN and infinite weights."""
    fitted = fit_grid(grouped, spec, number_format)
    if start is None:
        return fitted
    scale, zero_point = scales(start), zero_points(start)
    return Grid(scale, torch.zeros_like(scale) if zero_point is None else zero_point)


def base_range(grouped: Tensor, spec: WeightSpec, levels: Levels, grid: Grid, from_weight: bool) -> Range:
    """The range to be narrowed: a grid's own, or for integers with a zero point the weights' [as OmniQuant]."""
    if spec.symmetric:
        return Range(-grid.scale, grid.scale)
    if spec.has_integer_zero_point and from_weight:
        return Range(grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0))
    return Range((levels.low - grid.zero_point) * grid.scale, (levels.high - grid.zero_point) * grid.scale)


def moving_range(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, levels: Levels) -> Range:
    """:func:`base_range` of weights ``[n, groups, g]`` that have gradients: they reach the extremes of each group.

    Scales of formats that go by mean magnitudes (ternary, one bit) are taken for constants [ours].
    """
    exact = grouped.detach()
    low, high = base_range(exact, spec, levels, fit_grid(exact, spec, number_format), from_weight=True)
    if not is_laid_on_the_range(number_format):
        return Range(low, high)
    if spec.symmetric:
        largest = grouped.abs().amax(-1)
        high = high * (1 + (largest - largest.detach()) / nonzero(largest.detach()))
        return Range(-high, high)
    least, most = grouped.amin(-1), grouped.amax(-1)
    if spec.has_integer_zero_point:
        least, most = least.clamp(max=0), most.clamp(min=0)
    return Range(low + (least - least.detach()), high + (most - most.detach()))


def narrowed(
    base: Range, lower: Tensor, upper: Tensor, spec: WeightSpec, levels: Levels, learn_zero_point: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None: symmetric) ``[n, groups]`` as stored, differentiable in both factors.

    Symmetric: ``upper`` times the scale, ``lower`` unused. Integers: factors of the range's ends, which contains zero
    (SignRound arXiv 2309.05516, OmniQuant arXiv 2308.13137). Other tables, whose range need not contain zero:
    factors of its two halves, seen from the middle [ours]. Both factors at 1 give the base grid.

    Args:
        learn_zero_point: False: gradients do not pass integer zero points (OmniQuant rounds them without a
            straight-through estimator); through real ones they pass always.
    """
    if spec.symmetric:
        return stored(upper * base.high, spec.scale_dtype), None
    first, last = levels.low, levels.high
    if spec.has_integer_zero_point:
        low, high = lower * base.low, upper * base.high
        scale = stored((high - low) / (last - first), spec.scale_dtype)
        exact = first - low / nonzero(scale)
        zero_point = rounded(exact if learn_zero_point else exact.detach()).clamp(first, last)
    else:
        middle, half = (base.high + base.low) / 2, (base.high - base.low) / 2
        low, high = middle - lower * half, middle + upper * half
        scale = stored((high - low) / (last - first), spec.scale_dtype)
        zero_point = stored((first + last) / 2 - (high + low) / 2 / nonzero(scale), spec.scale_dtype)
    return scale, zero_point
