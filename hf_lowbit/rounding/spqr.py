"""SpQR (Dettmers et al., arXiv 2306.03078): small groups with coded scales, and single weights that stay exact.

GPTQ's sweep (:mod:`hf_lowbit.rounding.feedback`) with two additions. A weight whose error would cost too much,
e^2 = (w - q)^2 / U_ii^2 above a threshold, is an outlier: it keeps its value of that moment, and hands on no error. And
a group's grid is fitted without the weights that spoil it for the others, found by leaving out each in turn. The
threshold is tau = outlier_threshold * mean_j var(W_j) / U_jj^2, of the matrix as it comes.

Conventions:
 - codes and groups stay where their columns are [ours: the authors permute the columns by descending diagonal of H,
   group what is then adjacent, and store the permutation]. In the stored order each group is fitted to the weights as
   they are when it is reached, as the authors do; with act_order, all grids are fitted to the original weights;
 - leaving a weight out changes the range of its group only where it is the smallest or the largest one: two ranges
   are fitted instead of g [ours, the same result];
 - an outlier has a code as well, the nearest one, so that what is stored exactly is a small difference [ours];
 - the mean of the threshold is over all columns, those without input, whose weights are zero, included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec
from hf_lowbit.rounding.clip import fit_range
from hf_lowbit.rounding.feedback import Problem, Rounder, empty_grid, pose, round_columns
from hf_lowbit.rounding.grid import Grid, RoundingError, as_decoded
from hf_lowbit.rounding.store import join, row_chunks, to_groups, to_packed


class SpQRResult(NamedTuple):
    """A rounded matrix and its outliers.

    Attributes:
        packed: codes of all weights.
        outliers: bool ``[rows, columns]``.
        values: the outliers' weights, ``[count]``, in the order of ``outliers.nonzero()``.
        loss: tr((W - Q) H (W - Q)^T) with the damped H, outliers exact.
        damping: the one that was needed, at least the one asked for.
    """

    packed: PackedTensor
    outliers: Tensor
    values: Tensor
    loss: float
    damping: float


def spqr(
    weight: Tensor,
    spec: WeightSpec,
    hessian: Tensor,
    *,
    outlier_threshold: float = 0.2,
    damping: float = 1.0,
    act_order: bool = False,
    leave_one_out: bool = True,
    block_size: int = 128,
) -> SpQRResult:
    """Round a matrix, in float32, or in float64 if it is that.

    Args:
        weight: float ``[rows, columns]``.
        spec: integers of 2 to 8 bits with zero points; its group must divide the columns.
        hessian: ``[columns, columns]``, mean of x x^T over tokens; its scale does not matter.
        outlier_threshold: errors above this share of the mean weighted variance make outliers; infinite: none.
        damping: share of the mean diagonal added to the diagonal. The threshold is meant for 1: less damping makes
            other errors, and other numbers of outliers.
        act_order: columns with the largest diagonal first; codes stay where their columns are.
        leave_one_out: fit grids without the weights that spoil them; False: to the whole range of each group.
        block_size: columns between two updates of all later ones; it changes speed, not the result.

    Raises:
        RoundingError: NaN or infinite values, a Hessian of another shape, another number format, or scales that
            ``spec.scale_dtype`` cannot hold.
        CholeskyError: no damping up to 1 helps.
    """
    if spec.symmetric or not spec.number_format.is_integer_grid:
        raise RoundingError(f"SpQR rounds to integers with zero points, not to format {spec.format!r} as it is asked")
    problem = pose(weight, hessian, damping, act_order)
    number_format = spec.number_format
    threshold = _threshold(problem, outlier_threshold)
    fit = _Fit(problem, spec, number_format, threshold if leave_one_out else math.inf)
    grid = fit.whole() if act_order else empty_grid(problem.weight, spec)
    rounder = _KeepingRounder(problem, grid, number_format, threshold)
    codes, loss = round_columns(problem, rounder, number_format, block_size, None if act_order else fit.group)
    outliers, values = rounder.kept()
    return SpQRResult(to_packed(codes, grid, spec, number_format), outliers, values, loss, problem.damping)


def spoilers(
    grouped: Tensor, diagonal: Tensor, spec: WeightSpec, number_format: NumberFormat, threshold: float
) -> Tensor:
    """Which weights cost their groups more than ``threshold``, bool like ``grouped``: leave-one-out.

    The group's error, on the grid of its range, less that of the other weights on a grid of theirs.

    Args:
        grouped: float32 ``[rows, groups, g]``.
        diagonal: of the factor, ``[groups, g]``.
    """
    errors = _errors(grouped, grouped, diagonal, spec, number_format)
    gain = errors.clone()  # of weights within the range of the others
    for end in (grouped.argmin(-1, keepdim=True), grouped.argmax(-1, keepdim=True)):
        alone = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, end, True)
        others = _errors(without(grouped, alone), grouped, diagonal, spec, number_format).masked_fill_(alone, 0)
        gain.scatter_(-1, end, errors.sum(-1, keepdim=True) - others.sum(-1, keepdim=True))
    return gain > threshold


def without(grouped: Tensor, mask: Tensor) -> Tensor:
    """``[rows, groups, g]`` weights with the mean of the others in the places of the mask."""
    others = grouped.masked_fill(mask, 0).sum(-1, keepdim=True) / (~mask).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, others, grouped)


def _errors(fitted: Tensor, grouped: Tensor, diagonal: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Tensor:
    """e^2 of grouped weights on the grid of other ones, whose scales are not coded."""
    grid = fit_range(fitted, spec.first_level, number_format)
    values = number_format.nearest(grid.to_table_units(grouped)) - grid.zero_point.unsqueeze(-1)
    return values.mul_(grid.scale.unsqueeze(-1)).sub_(grouped).div_(diagonal).square_()


def _threshold(problem: Problem, relative: float) -> float:
    """tau; infinite for a single row, which has no variance."""
    if len(problem.weight) == 1:
        return math.inf
    factor, order = problem.factor.diagonal(), problem.order
    variance = problem.weight.var(0)
    return relative * float(((variance if order is None else variance[order]) / factor.square()).mean())


class _Fit(NamedTuple):
    """Grids of groups without what spoils them, as they are stored."""

    problem: Problem
    spec: WeightSpec
    number_format: NumberFormat
    threshold: float

    def whole(self) -> Grid:
        """All groups, fitted to the original weights."""
        weight, order = self.problem.weight, self.problem.order
        diagonal = self.problem.factor.diagonal()
        diagonal = diagonal if order is None else diagonal[torch.argsort(order)]
        grouped = diagonal.float().reshape(self.spec.groups(weight.shape[1]), -1)
        chunks = row_chunks(weight, self.spec.scale_group)
        return join([self._grid(to_groups(weight[rows], self.spec), grouped) for rows in chunks])

    def group(self, weight: Tensor, columns: slice) -> Grid:
        """One group ``[rows, g]`` that starts at the first of these columns."""
        return self._grid(weight.float().unsqueeze(1), self.problem.factor.diagonal()[columns].float()[None])

    def _grid(self, grouped: Tensor, diagonal: Tensor) -> Grid:
        if math.isfinite(self.threshold):
            grouped = without(grouped, spoilers(grouped, diagonal, self.spec, self.number_format, self.threshold))
        return as_decoded(fit_range(grouped, self.spec.first_level, self.number_format), self.spec)


class _KeepingRounder(Rounder):
    """Keeps the weights whose errors exceed a threshold."""

    is_plain = False

    def __init__(self, problem: Problem, grid: Grid, number_format: NumberFormat, threshold: float) -> None:
        super().__init__(problem, grid, number_format)
        self._threshold, self._like, self._order = threshold, problem.weight, problem.order
        self._places: list[Tensor] = []  # [n, 2] rows and visits
        self._values: list[Tensor] = []

    def round(self, w: Tensor, visit: int, value: Tensor, error: Tensor) -> None:
        """Also without an error where a weight is kept."""
        super().round(w, visit, value, error)
        rows = (error.square() > self._threshold).nonzero()
        if len(rows):
            self._places.append(torch.nn.functional.pad(rows, (0, 1), value=visit))
            self._values.append(w[rows[:, 0]])
            error[rows[:, 0]] = 0

    def kept(self) -> tuple[Tensor, Tensor]:
        """Mask ``[rows, columns]`` and values, in the stored order of columns."""
        mask = torch.zeros_like(self._like, dtype=torch.bool)
        if not self._places:
            return mask, self._like.new_empty(0)
        rows, columns = torch.cat(self._places).unbind(1)
        columns = columns if self._order is None else self._order[columns]
        mask[rows, columns] = True
        by_place = torch.argsort(rows * mask.shape[1] + columns)
        return mask, torch.cat(self._values)[by_place]
