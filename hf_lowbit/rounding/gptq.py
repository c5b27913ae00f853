"""GPTQ (Frantar et al., arXiv 2210.17323): columns one by one, each one's error made good by those after it.

Minimises tr((W - Q) H (W - Q)^T) greedily: with U the upper Cholesky factor of H^-1, the error e_i = (w_i - q_i) / U_ii
of column i is taken from the later columns j as e_i U_ij. The sum of all e^2 is that trace, with H as it was damped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec
from hf_lowbit.rounding.clip import GridFit, fit_range
from hf_lowbit.rounding.codebook import fit_codebook
from hf_lowbit.rounding.grid import Grid, RoundingError
from hf_lowbit.rounding.store import to_packed

_MOST_DAMPING = 1.0


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
    """Round a matrix.

    Args:
        weight: float ``[rows, columns]``.
        hessian: ``[columns, columns]``, mean of x x^T over tokens; its scale does not matter.
        damping: share of the mean diagonal added to the diagonal.
        act_order: columns with the largest diagonal first; codes stay where their columns are.
        block_size: columns between two updates of all later ones.
        grid_fit: how a group's grid is found.
        static_groups: fit all grids to the original weights; else each to the weights as they are when it is reached.

    Raises:
        RoundingError: NaN or infinite values, or act_order with groups fitted on the way.
        CholeskyError: no damping up to 1 helps.
    """
    if act_order and not static_groups:
        raise RoundingError("act_order needs static_groups=True: groups lie along the stored columns")
    if not bool(torch.isfinite(hessian).all()):
        raise RoundingError("the Hessian holds NaN or infinite values")
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    work, h = weight.to(precision).clone(), hessian.to(precision).clone()
    dead = h.diagonal() == 0
    work[:, dead] = 0
    h.diagonal()[dead] = 1
    table = fit_codebook(work.float(), spec) if spec.has_fitted_table else None
    number_format = spec.number_format if table is None else NumberFormat("codebook", spec.bits, table)
    grids = _Grids(work, spec, number_format, h.diagonal(), grid_fit, static_groups)
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        work, h = work[:, order], h[order][:, order]
    factor, used = _inverse_factor(h, damping)
    codes, loss = _columns(work, factor, grids, order, block_size)
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    return GPTQResult(to_packed(codes, grids.grid, spec, number_format, table), loss, used)


class _Grids:
    """The grid of every column, and how a column is rounded to it."""

    def __init__(
        self,
        weight: Tensor,
        spec: WeightSpec,
        number_format: NumberFormat,
        importance: Tensor,
        fit: GridFit,
        static: bool,
    ) -> None:
        self._spec, self._format, self._fit = spec, number_format, fit
        rows, columns = weight.shape
        self.groups = spec.groups(columns)
        self.size = columns // self.groups
        self.per_tensor = spec.group_size == "tensor"
        self._importance = importance.float().reshape(self.groups, -1)
        self.static = static or self.groups == 1
        self.grid = self._whole(weight) if self.static else Grid(*(weight.new_zeros(2, rows, self.groups).float()))
        self._integers = number_format.is_integer_grid
        self._low, self._high = number_format.table[0].item(), number_format.table[-1].item()

    def _whole(self, weight: Tensor) -> Grid:
        shape = (1, 1, -1) if self.per_tensor else (weight.shape[0], self.groups, -1)
        importance = None if self.per_tensor else self._importance
        grid = self._fit(weight.float().reshape(shape), self._spec, self._format, importance)
        return grid

    def refit(self, group: int, weights: Tensor) -> None:
        """Fit one group to its current weights ``[rows, g]``."""
        importance = self._importance[group : group + 1]
        grid = self._fit(weights.float().unsqueeze(1), self._spec, self._format, importance)
        self.grid.scale[:, group], self.grid.zero_point[:, group] = grid.scale[:, 0], grid.zero_point[:, 0]

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(uint8 codes, table values) of a column in table units."""
        if self._integers:
            nearest = values.round().clamp_(self._low, self._high)
            return (nearest - self._low).to(torch.uint8), nearest
        codes = self._format.encode(values)
        return codes, self._format.decode(codes)


def _inverse_factor(h: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped H, and the damping that was needed."""
    mean = h.diagonal().mean()
    while True:
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(factor).all()):
            return factor, damping
        if damping >= _MOST_DAMPING:
            raise CholeskyError(f"its Hessian is not positive definite even with damping={damping:g}")
        damping = min(10 * damping, _MOST_DAMPING)


def _columns(
    work: Tensor, factor: Tensor, grids: _Grids, order: Tensor | None, block_size: int
) -> tuple[Tensor, float]:
    """Codes ``[rows, columns]`` in the order of ``work``, and the loss. Works on columns as rows: they are contiguous."""
    rows, columns = work.shape
    work = work.t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=work.device)
    group_of = (torch.arange(columns) if order is None else order.cpu()).div(grids.size, rounding_mode="floor").tolist()
    diagonal = factor.diagonal().tolist()
    if not grids.static:  # whole groups in a block: a group is fitted to weights that carry all errors so far
        block_size = grids.size * max(1, block_size // grids.size)
    loss = 0.0
    scale, zero, inverse = _by_group(grids, work.dtype)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty(end - start, rows, dtype=work.dtype, device=work.device)
        for column in range(start, end):
            group = group_of[column]
            if not grids.static and column % grids.size == 0:
                grids.refit(group, work[column : column + grids.size].t())
                scale, zero, inverse = _by_group(grids, work.dtype)
            w = work[column]
            codes[column], values = grids.round(torch.addcmul(zero[group], w, inverse[group]).float())
            error = torch.addcmul(w, values - zero[group], scale[group], value=-1).div_(diagonal[column])
            errors[column - start] = error
            if column + 1 < end:
                work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
        loss += float(errors.square().sum())
    return codes.t(), loss


def _by_group(grids: _Grids, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and inverse scale as contiguous ``[groups, rows or 1]``."""
    scale = grids.grid.scale.t().contiguous().to(dtype)
    zero = grids.grid.zero_point.t().contiguous().to(dtype)
    return scale, zero, torch.where(scale == 0, torch.ones_like(scale), scale).reciprocal()
