"""GPTQ (Frantar et al., arXiv 2210.17323): columns one by one, each one's error made good by those after it.

Minimises tr((W - Q) H (W - Q)^T) greedily: with U the upper Cholesky factor of H^-1, the error e_i = (w_i - q_i) / U_ii
of column i is taken from the later columns j as e_i U_ij. The sum of all e^2 is that trace, with H as it was damped.

Conventions:
 - U is the inverse of the upper M with H = M M^T: one factorisation instead of two, as accurate [ours];
 - inputs that are always zero get the mean of the other diagonal elements, so that the scale of H does not matter
   [ours; the authors' code sets them to 1];
 - groups that are fitted on the way see every error so far, also those of their own block [ours; the authors' code
   leaves those out].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec
from hf_lowbit.rounding.clip import GridFit, fit_range
from hf_lowbit.rounding.grid import Grid, RoundingError, nearest_values, nonzero
from hf_lowbit.rounding.store import format_for, to_groups, to_packed

_FIRST_DAMPING, _MOST_DAMPING = 1e-3, 1.0  # after a failure without any, and the last resort


class CholeskyError(RoundingError):
    """A Hessian that no damping makes positive definite."""


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
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise RoundingError(f"a weight of {weight.shape[1]} columns has no Hessian of {tuple(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise RoundingError("the Hessian holds NaN or infinite values")
    if not bool(torch.isfinite(weight).all()):
        raise RoundingError("the weight holds NaN or infinite values")
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    h = hessian.to(weight.device, torch.promote_types(hessian.dtype, torch.float32), copy=True)
    power = h.diagonal().clone()
    dead = power == 0
    h.diagonal()[dead] = 1.0 if bool(dead.all()) else power[~dead].mean()
    work = weight.to(precision).masked_fill(dead, 0)
    number_format, table = format_for(work, spec)
    order = torch.argsort(power, descending=True, stable=True) if act_order else None
    factor, used = _inverse_factor(h if order is None else h[order][:, order], damping, precision)
    static = static_groups or spec.groups(work.shape[1]) == 1
    fit = _Fit(grid_fit, spec, number_format, power)
    grid = fit.whole(work) if static else Grid(*(work.new_zeros(2, work.shape[0], spec.groups(work.shape[1])).float()))
    codes, loss = _round_columns(work, factor, grid, number_format, order, block_size, None if static else fit)
    return GPTQResult(to_packed(codes, grid, spec, number_format, table), loss, used)


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
        return self.fit(grouped, self.spec, self.number_format, self.power.float().reshape(groups, -1))

    def group(self, weight: Tensor, columns: slice) -> Grid:
        """One group ``[rows, g]``, which covers these columns."""
        return self.fit(weight.float().unsqueeze(1), self.spec, self.number_format, self.power[columns].float()[None])


def _inverse_factor(h: Tensor, damping: float, precision: torch.dtype) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped H, of type ``precision``, and the damping that was needed.

    What float32 cannot factorise, float64 may: it is tried before more damping is. Where float32 can, it is good: its
    factors were off by 1e-6 (damping 0.01, condition 1e5) to 1e-4 (1e-4, 1e7).
    """
    mean = h.diagonal().mean()
    while True:
        for tried in dict.fromkeys((precision, torch.float64)):
            factor = _factor(h, damping * mean, tried)
            if factor is not None:
                return factor.to(precision), damping
        if damping >= _MOST_DAMPING:
            raise CholeskyError(f"its Hessian is not positive definite even with damping={damping:g}")
        damping = min(10 * damping if damping else _FIRST_DAMPING, _MOST_DAMPING)


def _factor(h: Tensor, added: Tensor, precision: torch.dtype) -> Tensor | None:
    """The factor for H + added I, computed in ``precision``; None where that fails."""
    reverse = h.to(precision).flip(0, 1)  # a copy
    reverse.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(reverse)
    if failed:
        return None
    upper = lower.flip(0, 1)
    del reverse, lower  # of the size of H each, which may be half a gigabyte
    factor = torch.linalg.solve_triangular(upper, torch.eye(len(h), dtype=precision, device=h.device), upper=True)
    return factor if bool(torch.isfinite(factor).all()) else None


def _round_columns(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    number_format: NumberFormat,
    order: Tensor | None,
    block_size: int,
    fit: _Fit | None,
) -> tuple[Tensor, float]:
    """Codes ``[rows, columns]`` and the loss.

    Columns are visited in ``order``, which is that of ``factor``; grid and codes are in the stored one. ``fit`` fills
    the grid in on the way. The working copy is transposed: its columns are contiguous.
    """
    rows, columns = weight.shape
    work = (weight if order is None else weight[:, order]).t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=work.device)
    size = columns // grid.scale.shape[1]
    group_of = (torch.arange(columns) if order is None else order.cpu()).div(size, rounding_mode="floor").tolist()
    diagonal, loss = factor.diagonal().tolist(), work.new_zeros((), dtype=torch.float64)
    rounder = _Rounder(grid, number_format, rows, work.dtype)
    for start, end in _blocks(columns, block_size, None if fit is None else size):
        if fit is not None and start % size == 0:
            group = start // size
            fitted = fit.group(work[start : start + size].t(), slice(start, start + size))
            grid.scale[:, group], grid.zero_point[:, group] = fitted.scale[:, 0], fitted.zero_point[:, 0]
            rounder.refresh(group)
        values, errors = torch.empty_like(work[start:end]), torch.empty_like(work[start:end])
        own = factor[start:end, start:end]
        for i, (w, value, error) in enumerate(zip(work[start:end], values, errors, strict=True)):
            rounder.round(w, group_of[start + i], value, error)
            error.div_(diagonal[start + i])
            if start + i + 1 < end:
                work[start + i + 1 : end].addr_(own[i, i + 1 :], error, alpha=-1)
        codes[start:end] = number_format.encode(values)
        loss += errors.square().sum()
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    if order is not None:
        codes = codes[torch.argsort(order)]
    return codes.t(), float(loss)


def _blocks(columns: int, block_size: int, group: int | None) -> list[tuple[int, int]]:
    """Ranges of columns; given a group that is fitted on the way, none reaches beyond one.

    Later columns lack the errors of the block that is under way, so that a group must start with its block.
    """
    whole = columns if group is None else group
    return [
        (start, min(start + block_size, first + whole))
        for first in range(0, columns, whole)
        for start in range(first, first + whole, block_size)
    ]


class _Rounder:
    """Rounds columns to the grids of their groups; no allocation and few operations per column of an integer grid."""

    def __init__(self, grid: Grid, number_format: NumberFormat, rows: int, dtype: torch.dtype) -> None:
        self._grid, self._format, self._dtype = grid, number_format, dtype
        self._integers = number_format.is_integer_grid
        self._low, self._high = number_format.table[0].item(), number_format.table[-1].item()
        groups = range(grid.scale.shape[1])
        self._scale, self._divisor, self._zero = ([grid.scale[:, g] for g in groups] for _ in range(3))
        for group in groups:
            self.refresh(group)
        self._shifted = torch.empty(rows, dtype=dtype, device=grid.scale.device)

    def refresh(self, group: int) -> None:
        """Read a group's grid again: contiguous ``[rows or 1]``."""
        scale, zero = (part[:, group].to(self._dtype).contiguous() for part in self._grid)
        self._scale[group], self._divisor[group], self._zero[group] = scale, nonzero(scale), zero

    def round(self, w: Tensor, group: int, value: Tensor, error: Tensor) -> None:
        """Write the nearest table values of ``w`` and its rounding errors, ``[rows]`` each."""
        zero = self._zero[group]
        torch.div(w, self._divisor[group], out=value).add_(zero)
        if self._integers:
            value.round_().clamp_(self._low, self._high)
        else:
            value.copy_(nearest_values(value, self._format))
        torch.sub(value, zero, out=self._shifted)
        torch.addcmul(w, self._shifted, self._scale[group], value=-1, out=error)
