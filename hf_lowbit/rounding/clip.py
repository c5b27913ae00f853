"""Grids from a search of the clipping range: what the largest weights lose by saturating, the others win in resolution.

GPTQ's and AdaRound's codes search shrink factors of the range in steps of 1 % for the least |w - w_hat|^2.4; AWQ's code
those of 5 %. Here every group keeps the factor with the least error of its own, weighted by the power of the inputs
that meet each column where that is known [ours]. Further conventions [ours]:
 - ranges shrink towards zero, or towards their own nearest end where they do not contain it;
 - of asymmetric ranges, each end is then moved alone;
 - formats whose grid does not follow the extremes (ternary, one bit) search multiples of their scale, up and down;
 - symmetric integers have one more value below zero than above: their scale may be negative, which puts it on the
   other side, so that the largest weight of either sign can be met without a wasted code (AutoRound's code does so).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec
from hf_lowbit.kernels import rounding_errors
from hf_lowbit.rounding.grid import (
    Grid,
    RoundingError,
    fit_grid,
    grid_of_range,
    is_laid_on_the_range,
    rescaled,
)

GridFit = Callable[[Tensor, WeightSpec, NumberFormat, Tensor | None], Grid]
_Measure = Callable[[Tensor, Grid], Tensor]  # weights [rows, groups, g] and their grid -> errors [rows, groups]

CANDIDATES = tuple(1 - 0.02 * step for step in range(1, 36))  # 0.98, 0.96, ... 0.30
_COARSE = tuple(1 - 0.05 * step for step in range(1, 10))  # AWQ's
_CHUNK_ELEMENTS = 1 << 18  # rows are searched in chunks: the temporaries of all candidates stay in the cache
_CHUNKS_AT_ONCE = 4  # where a kernel needs no temporaries, and calls cost more


def fit_range(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None = None) -> Grid:
    """The grid of each group's whole range; ``importance`` is not read."""
    return fit_grid(grouped, spec, number_format)


def fit_clipped(
    grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None = None
) -> Grid:
    """The grid of the best clipped range of each group: :func:`search_grid`, of tables with half as many candidates.

    Looking values up takes several times as long as rounding them.
    """
    candidates = CANDIDATES if number_format.is_integer_grid else CANDIDATES[1::2]
    return search_grid(grouped, spec, number_format, importance, candidates)


def search_grid(
    grouped: Tensor,
    spec: WeightSpec,
    number_format: NumberFormat,
    importance: Tensor | None = None,
    candidates: Sequence[float] = CANDIDATES,
    norm: float = 2.4,
) -> Grid:
    """The grid of the best clipped range of each group, never worse than :func:`fit_range` by the same measure.

    Args:
        grouped: float32 ``[rows, groups, g]``; ``[1, 1, rows * columns]`` for one grid of a whole matrix.
        importance: mean square of the input that meets each column, ``[columns]`` or ``[groups, g]``; errors count
            squared then, times it.
        candidates: shrink factors of the range; 1 need not be among them.
        norm: exponent of the errors without importance.

    Raises:
        RoundingError: as :func:`hf_lowbit.rounding.grid.fit_grid`.
    """
    end_candidates = (1.0, *candidates[::4])
    if importance is None:

        def measure(part: Tensor, grid: Grid) -> Tensor:
            return _difference(part, grid, number_format).abs_().pow_(norm).sum(-1)

        return _chunked(grouped, spec, number_format, measure, candidates, end_candidates)
    weights = importance.to(grouped).reshape(grouped.shape[1], -1)
    width = weights.shape[-1]

    def weighted(part: Tensor, grid: Grid) -> Tensor:
        if part.shape[-1] != width:  # one grid for all: its rows share the weights
            rows = part.reshape(-1, 1, width)
            scale, zero_point = (tensor.expand(len(rows), 1) for tensor in grid)
            return rounding_errors(rows, scale, zero_point, number_format, weights).sum(0, True)
        return rounding_errors(part, grid.scale, grid.zero_point, number_format, weights)

    return _chunked(grouped, spec, number_format, weighted, candidates, end_candidates, width, _CHUNKS_AT_ONCE)


def fit_output_error(hessian: Tensor, spec: WeightSpec) -> GridFit:
    """A fit that weighs each group's rounding error by what it does to the group's part of the output.

    AWQ's clip search (arXiv 2306.00978, authors' code): the mean over tokens of (sum over a group of x (w_hat - w))^2.
    That is e H_g e^T with the group's block of H = mean x x^T: all tokens count, none is kept [ours; the authors sample
    512 of them].
    """
    columns = hessian.shape[0]
    groups = spec.groups(columns)
    size = columns // groups
    blocks = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, columns, size)]).float()

    def fit(grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, importance: Tensor | None = None) -> Grid:
        def measure(part: Tensor, grid: Grid) -> Tensor:
            difference = _difference(part, grid, number_format).unflatten(-1, (-1, size))
            by_group = difference.transpose(0, 1)  # [groups, rows, rows that share a grid, size]
            moved = torch.matmul(by_group, blocks.unsqueeze(1))
            return (moved * by_group).sum((-2, -1)).t()

        return _chunked(grouped, spec, number_format, measure, _COARSE, (), size)

    return fit


def _chunked(
    grouped: Tensor,
    spec: WeightSpec,
    number_format: NumberFormat,
    measure: _Measure,
    factors: Sequence[float],
    end_factors: Sequence[float],
    width: int = 1,
    at_once: int = 1,
) -> Grid:
    """Search in chunks of rows; one group for all is measured in pieces of a multiple of ``width`` weights."""
    step = max(1, at_once * _CHUNK_ELEMENTS // max(1, grouped[0].numel()))
    piece = width * max(1, _CHUNK_ELEMENTS // width)

    def search(chunk: Tensor) -> Grid:
        pieces = chunk.split(piece, dim=-1) if chunk.shape[:2] == (1, 1) else (chunk,)

        def error(grid: Grid) -> Tensor:
            return torch.stack([measure(part, grid) for part in pieces]).sum(0)

        best = _Best(fit_grid(chunk, spec, number_format), error)
        if is_laid_on_the_range(number_format):
            _search_range(chunk, spec, number_format, best, factors, end_factors)
            if spec.symmetric and number_format.is_integer_grid:
                _search_signed(chunk, spec, number_format, best, factors)
        else:
            start = best.grid
            for factor in factors:
                best.offer(partial(rescaled, start, factor, spec))
                best.offer(partial(rescaled, start, 1 / factor, spec))
        return best.grid

    parts = [search(chunk) for chunk in grouped.split(step)]
    return Grid(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class _Best:
    """The best grid so far, group by group."""

    def __init__(self, grid: Grid, error: Callable[[Grid], Tensor]) -> None:
        self.grid, self._error, self._least = grid, error, error(grid)

    def offer(self, make: Callable[[], Grid]) -> Tensor:
        """Take a candidate where it is better, and say where: bool ``[rows, groups]``."""
        try:
            grid = make()
        except RoundingError:  # storage holds the scales of the whole range, but not all of these: no candidate
            return torch.zeros_like(self._least, dtype=torch.bool)
        error = self._error(grid)
        better = error < self._least
        self._least = torch.where(better, error, self._least)
        self.grid = Grid(*(torch.where(better, new, old) for new, old in zip(grid, self.grid, strict=True)))
        return better


def _search_range(
    grouped: Tensor,
    spec: WeightSpec,
    number_format: NumberFormat,
    best: _Best,
    factors: Sequence[float],
    end_factors: Sequence[float],
) -> None:
    """Offer the grids of smaller ranges: both ends by the same factor; where there are two, then each alone."""
    if spec.symmetric:
        high = grouped.abs().amax(-1)
        low = -high
    else:
        low, high = grouped.amin(-1), grouped.amax(-1)
    towards = low.clamp(min=0) + high.clamp(max=0)  # zero, or the end next to it
    kept_low, kept_high = low, high

    def offer(new_low: Tensor, new_high: Tensor) -> None:
        nonlocal kept_low, kept_high
        better = best.offer(lambda: grid_of_range(new_low, new_high, spec, number_format))
        kept_low, kept_high = torch.where(better, new_low, kept_low), torch.where(better, new_high, kept_high)

    for factor in factors:
        offer(torch.lerp(towards, low, factor), torch.lerp(towards, high, factor))
    if spec.symmetric:
        return
    for factor in end_factors:  # an outlier at one end
        offer(low, torch.lerp(towards, high, factor))
        offer(torch.lerp(towards, low, factor), high)
    for factor in end_factors:  # around the best so far
        offer(kept_low, torch.lerp(towards, high, factor))
    for factor in end_factors:
        offer(torch.lerp(towards, low, factor), kept_high)


def _search_signed(
    grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, best: _Best, factors: Sequence[float]
) -> None:
    """Offer scales that put the lowest code on the largest weight, whatever its sign."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    extreme = torch.where(high > -low, high, low) / number_format.table[0].item()
    zero = torch.zeros_like(extreme)
    for factor in (1.0, *factors):
        best.offer(partial(rescaled, Grid(extreme, zero), factor, spec))


def _difference(grouped: Tensor, grid: Grid, number_format: NumberFormat) -> Tensor:
    """Weights less their rounded values."""
    values = number_format.nearest(grid.to_table_units(grouped))
    return grouped - (values - grid.zero_point.unsqueeze(-1)).mul_(grid.scale.unsqueeze(-1))
