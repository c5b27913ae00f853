"""HQQ: the scale of each group stays, its zero point is optimised under a loss that forgives outliers (data-free).

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, November 2023). For a
group w with w_hat = scale * (q - z), q the codes' values, it minimises |w - w_hat|_p, p < 1, over z, by splitting off
the residual e that the loss forgives:

    minimise |e|_p + beta / 2 |e - (w - w_hat)|^2    ->  e = shrink(w - w_hat)
    minimise |z - (q - (w - e) / scale)|^2           ->  z = mean of q - (w - e) / scale over the group

Conventions:
 - beta is in the units of the weights, as in the authors' code: residuals below beta^(-1 / (2 - p)) (0.17 with the
   defaults) count as nothing but error, so for weights of usual size every step adds the mean residual to z;
 - it starts from the grid of :func:`hf_lowbit.rounding.grid.fit_grid`: the range itself with a real zero point (HQQ's),
   a range that contains zero with an integer one;
 - each group keeps the best of the zero points visited, by the sum of |w - w_hat| after the zero point's own rounding
   to its stored type [ours: the authors keep the last, or the best over all groups together]; a group whose start is
   never beaten stays as rounding to nearest leaves it;
 - search_scale repeats this with ranges shrunk in steps of 5 % down to half [ours; the authors' second version searches
   the scale too].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec
from hf_lowbit.formats.packed import from_bits, to_bits
from hf_lowbit.rounding.grid import Grid, RoundingError, fit_grid, nonzero
from hf_lowbit.rounding.store import stack, to_packed

_CHUNK_ELEMENTS = 1 << 18  # rows are optimised in chunks: the temporaries of 20 steps stay in the cache
_SHRUNK_RANGES = tuple(step / 20 for step in range(19, 9, -1))  # 0.95, 0.90, ... 0.50


class HalfQuadratic(NamedTuple):
    """The loss |.|_p and the schedule of its splitting: ``beta`` grows by the factor ``kappa`` with each step."""

    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01


def half_quadratic_round(
    weight: Tensor,
    spec: WeightSpec,
    *,
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    search_scale: bool = False,
) -> PackedTensor:
    """Quantize a weight to asymmetric integers.

    Args:
        weight: float ``[rows, columns]``, or ``[experts, rows, columns]``.
        spec: format "int" and symmetric=False; real_zero_point=True keeps all that the optimisation finds.
        iterations: steps per group; 0 is rounding to nearest.
        p: exponent of the loss, 0 < p <= 1; 1 is the soft threshold.
        beta, kappa: weight of the quadratic term, > 0, and its growth.
        search_scale: also try smaller ranges, at eleven times the cost.

    Raises:
        RoundingError: another kind of spec, NaN or infinite weights, or scales that ``spec.scale_dtype`` cannot hold.
    """
    if spec.format != "int" or spec.symmetric:
        raise RoundingError(
            "half-quadratic rounding optimises the zero points of integers: it needs format 'int' and symmetric=False"
        )
    loss = HalfQuadratic(iterations, p, beta, kappa)
    if weight.dim() == 3:
        return stack([_round_matrix(matrix, spec, loss, search_scale) for matrix in weight])
    return _round_matrix(weight, spec, loss, search_scale)


def shrink(residual: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) max(|x| - |x|^(p-1) / beta, 0): the minimiser of |e|_p + beta/2 (e - x)^2, exact for p = 1."""
    magnitude = residual.abs()
    threshold = magnitude.pow(p - 1) / beta if p != 1 else 1 / beta  # infinite at 0 for p < 1: nothing is left there
    return residual.sign() * (magnitude - threshold).clamp_(min=0)


def next_zero_point(grouped: Tensor, values: Tensor, grid: Grid, beta: float, p: float) -> Tensor:
    """One step: zero points ``[n, groups]`` for weights and the values of their codes, both ``[n, groups, g]``."""
    scale = nonzero(grid.scale).unsqueeze(-1)
    forgiven = shrink(grouped - _decoded(values, grid), beta, p)
    return (values - (grouped - forgiven) / scale).mean(-1)


def _round_matrix(weight: Tensor, spec: WeightSpec, loss: HalfQuadratic, search_scale: bool) -> PackedTensor:
    number_format = spec.number_format
    rows, columns = weight.shape
    whole = spec.group_size == "tensor"  # one group: it cannot be cut
    shape = (1, 1, -1) if whole else (-1, spec.groups(columns), columns // spec.groups(columns))
    codes, grids = [], []
    for chunk in weight.split(rows if whole else max(1, _CHUNK_ELEMENTS // columns)):
        grouped = chunk.float().reshape(shape)
        grid = optimise_grid(grouped, spec, number_format, loss, search_scale)
        codes.append(number_format.encode(grid.to_table_units(grouped)).reshape(chunk.shape))
        grids.append(grid)
    grid = Grid(*(torch.cat(parts) for parts in zip(*grids, strict=True)))
    return to_packed(torch.cat(codes), grid, spec, number_format)


def optimise_grid(
    grouped: Tensor, spec: WeightSpec, number_format: NumberFormat, loss: HalfQuadratic, search_scale: bool = False
) -> Grid:
    """The best grid found for float32 ``[n, groups, g]`` weights, as storage holds it.

    Raises:
        RoundingError: as :func:`hf_lowbit.rounding.grid.fit_grid`.
    """
    start = fit_grid(grouped, spec, number_format)
    best, error = start, _error(grouped, number_format.nearest(start.to_table_units(grouped)), start)
    best, error = _optimise_zero_point(grouped, start, spec, number_format, loss, best, error)
    for factor in _SHRUNK_RANGES if search_scale else ():
        scale = from_bits(to_bits(start.scale * factor, spec.scale_dtype), spec.scale_dtype)
        middle = (number_format.table[0] + number_format.table[-1]).item() / 2  # of the codes; it keeps its weight
        zero_point = _as_stored(
            middle + (start.zero_point - middle) * start.scale / nonzero(scale), spec, number_format
        )
        best, error = _optimise_zero_point(grouped, Grid(scale, zero_point), spec, number_format, loss, best, error)
    return best


def _optimise_zero_point(
    grouped: Tensor,
    start: Grid,
    spec: WeightSpec,
    number_format: NumberFormat,
    loss: HalfQuadratic,
    best: Grid,
    error: Tensor,
) -> tuple[Grid, Tensor]:
    """Of ``best`` and what the steps from ``start`` visit the best, group by group, and its error ``[n, groups]``."""
    current, beta = start, loss.beta
    for step in range(loss.iterations + 1):
        stored = Grid(start.scale, _as_stored(current.zero_point, spec, number_format))
        found = _error(grouped, number_format.nearest(stored.to_table_units(grouped)), stored)
        better = found < error
        error = torch.where(better, found, error)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(stored, best, strict=True)))
        if step == loss.iterations:
            break
        moved = next_zero_point(grouped, number_format.nearest(current.to_table_units(grouped)), current, beta, loss.p)
        current, beta = Grid(start.scale, moved), beta * loss.kappa
    return best, error


def _decoded(values: Tensor, grid: Grid) -> Tensor:
    return (values - grid.zero_point.unsqueeze(-1)).mul_(grid.scale.unsqueeze(-1))


def _error(grouped: Tensor, values: Tensor, grid: Grid) -> Tensor:
    return (grouped - _decoded(values, grid)).abs_().sum(-1)


def _as_stored(zero_point: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Tensor:
    if spec.has_integer_zero_point:
        return zero_point.round().clamp_(number_format.table[0].item(), number_format.table[-1].item())
    return from_bits(to_bits(zero_point, spec.scale_dtype), spec.scale_dtype)
