"""GPTQ (Frantar et al., arXiv 2210.17323): columns one by one, each one's error made good by those after it.

Minimises tr((W - Q) H (W - Q)^T) greedily, by the sweep of :mod:`hf_lowbit.rounding.feedback`.

Conventions:
 - U is the inverse of the upper M with H = M M^T: one factorisation instead of two, as accurate [ours];
 - inputs that are always zero get the mean of the other diagonal elements, so that the scale of H does not matter
   [ours; the authors' code sets them to 1];
 - groups that are fitted on the way see every error so far, also those of their own block [ours; the authors' code
   leaves those out].
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec
from hf_lowbit.rounding.clip import GridFit, fit_range
from hf_lowbit.rounding.feedback import CholeskyError, Rounder, empty_grid, pose, round_columns
from hf_lowbit.rounding.grid import Grid, RoundingError, as_decoded
from hf_lowbit.rounding.store import format_for, to_groups, to_packed

__all__ = ["CholeskyError", "GPTQResult", "gptq"]


class GPTQResult(NamedTuple):
    """A rounded matrix.

    Attributes:
        packed: its codes.
        loss: tr((W - Q) H (W - Q)^T) with the damped H.
        damping: the one that was needed, at least the one asked for.
    """

    packed: PackedTensor
    loss: float
    damping: float


def gptq(
    weight: Tensor,
    spec: WeightSpec,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
    grid_fit: GridFit = fit_range,
    static_groups: bool = True,
) -> GPTQResult:
    """Round a matrix, in float32, or in float64 if it is that.

    Args:
        weight: float ``[rows, columns]``.
        spec: any number format and granularity; its group must divide the columns.
        hessian: ``[columns, columns]``, mean of x x^T over tokens; its scale does not matter.
        damping: share of the mean diagonal added to the diagonal.
        act_order: columns with the largest diagonal first; codes stay where their columns are.
        block_size: columns between two updates of all later ones; it changes speed, not the result.
        grid_fit: how a group's grid is found; it is handed the diagonal of the Hessian.
        static_groups: fit all grids to the original weights; else each to the weights as they are when it is reached.

    Raises:
        RoundingError: NaN or infinite values, a Hessian of another shape, scales that ``spec.scale_dtype`` cannot
            hold, or act_order with groups fitted on the way.
        CholeskyError: no damping up to 1 helps.
    """
    if act_order and not static_groups:
        raise RoundingError("act_order needs static_groups=True: groups lie along the stored columns")
    problem = pose(weight, hessian, damping, act_order)
    work = problem.weight
    number_format, table = format_for(work, spec)
    static = static_groups or spec.groups(work.shape[1]) == 1
    fit = _Fit(grid_fit, spec, number_format, problem.power)
    grid = fit.whole(work) if static else empty_grid(work, spec)
    rounder = Rounder(problem, grid, number_format)
    codes, loss = round_columns(problem, rounder, number_format, block_size, None if static else fit.group)
    return GPTQResult(to_packed(codes, grid, spec, number_format, table), loss, problem.damping)


class _Fit(NamedTuple):
    """How grids are fitted, with the mean square of each column's input."""

    fit: GridFit
    spec: WeightSpec
    number_format: NumberFormat
    power: Tensor

    def whole(self, weight: Tensor) -> Grid:
        """All groups of ``[rows, columns]``."""
        groups = self.spec.groups(weight.shape[1])
        grouped = weight.float().reshape(1, 1, -1) if self.spec.group_size == "tensor" else to_groups(weight, self.spec)
        power = self.power.float().reshape(groups, -1)
        return as_decoded(self.fit(grouped, self.spec.first_level, self.number_format, power), self.spec)

    def group(self, weight: Tensor, columns: slice) -> Grid:
        """One group ``[rows, g]``, which covers these columns."""
        grouped, power = weight.float().unsqueeze(1), self.power[columns].float()[None]
        return as_decoded(self.fit(grouped, self.spec.first_level, self.number_format, power), self.spec)
