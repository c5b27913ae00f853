"""Grids from a search of the clipping range: what the largest weights lose by saturating, the others win in resolution.

GPTQ's and AdaRound's codes search shrink factors of the range in steps of 1 % for the least |w - w_hat|^2.4; AWQ's those
of 5 %. Here every group keeps the factor with the least error of its own, weighted by the power of the inputs that
meet each column where that is known [ours].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec
from hf_lowbit.rounding.grid import Grid, fit_grid

GridFit = Callable[[Tensor, WeightSpec, NumberFormat, Tensor | None], Grid]

_FACTORS = tuple(1 - 0.02 * step for step in range(36))
_NORM = 2.4
_CHUNK_ELEMENTS = 1 << 20


def fit_range(
    grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None = None
) -> Grid:
    """The grid of each group's whole range; ``importance`` is not read."""
    return fit_grid(grouped, spec, number_format)


def fit_clipped(
    grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None = None
) -> Grid:
    """The grid of the best clipped range of each group.

    Args:
        grouped: float32 ``[rows, groups, g]``.
        importance: ``[groups, g]``, mean square of the input that each weight meets; errors count squared then,
            without it with the power 2.4.

    Returns:
        Scales and zero points ``[rows, groups]``, never worse than :func:`fit_range` by that measure.
    """
    step = max(1, _CHUNK_ELEMENTS // max(1, grouped[0].numel()))
    parts = [_search(chunk, spec, number_format, importance) for chunk in grouped.split(step)]
    return Grid(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _search(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None) -> Grid:
    best = fit_grid(grouped, spec, number_format)
    least = _error(grouped, best, number_format, importance)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    for factor in _FACTORS[1:]:
        grid = fit_grid(torch.maximum(torch.minimum(grouped, factor * high), factor * low), spec, number_format)
        error = _error(grouped, grid, number_format, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero_point, best.zero_point))
    return best


def _error(grouped: Tensor, grid: Grid, number_format: NumberFormat, importance: Tensor | None) -> Tensor:
    values = number_format.decode(number_format.encode(grid.to_table_units(grouped)))
    difference = grouped - (values - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
    if importance is None:
        return difference.abs_().pow_(_NORM).sum(-1)
    return (difference.square_() * importance).sum(-1)
