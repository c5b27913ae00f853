"""Columns rounded one by one, each one's error made good by those after it: the sweep of GPTQ and its kin.

With U the upper Cholesky factor of H^-1, the error e_i = (w_i - q_i) / U_ii of column i is taken from the later columns
j as e_i U_ij. The sum of all e^2 is tr((W - Q) H (W - Q)^T), with H as it was damped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec
from hf_lowbit.kernels.triton import runs_on
from hf_lowbit.rounding.grid import Grid, RoundingError, nonzero

GroupFit = Callable[[Tensor, slice], Grid]  # a group's weights [rows, g] as they are now, its columns -> [rows, 1]

_WIDEST = 128  # columns that the fused sweep keeps in registers
_FIRST_DAMPING, _MOST_DAMPING = 1e-3, 1.0  # after a failure without any, and the last resort


class CholeskyError(RoundingError):
    """A Hessian that no damping makes positive definite."""


class Problem(NamedTuple):
    """A matrix and what its columns' errors cost.

    Attributes:
        weight: float ``[rows, columns]``, zero where no input comes; in float32, or in float64 if it was that.
        power: mean square of each column's input, ``[columns]``.
        order: in which columns are visited, ``[columns]``; None for the stored order.
        factor: upper Cholesky factor of the inverse of the damped H, ``[columns, columns]`` in that order.
        damping: the one that was needed, at least the one asked for.
    """

    weight: Tensor
    power: Tensor
    order: Tensor | None
    factor: Tensor
    damping: float


def pose(weight: Tensor, hessian: Tensor, damping: float, act_order: bool) -> Problem:
    """Arguments and errors of :func:`hf_lowbit.rounding.gptq.gptq`."""
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise RoundingError(f"a weight of {weight.shape[1]} columns has no Hessian of {tuple(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise RoundingError("the Hessian holds NaN or infinite values")
    if not bool(torch.isfinite(weight).all()):
        raise RoundingError("the weight holds NaN or infinite values")
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    h = hessian.to(weight.device, torch.promote_types(hessian.dtype, torch.float32))
    power = h.diagonal().clone()
    dead = power == 0
    squares = power.masked_fill(dead, 1.0 if bool(dead.all()) else power[~dead].mean())
    work = weight.to(precision).masked_fill(dead, 0)
    order = torch.argsort(power, descending=True, stable=True) if act_order else None
    factor, used = inverse_factor(h, squares, order, damping, precision)
    return Problem(work, power, order, factor, used)


def inverse_factor(
    h: Tensor, diagonal: Tensor, order: Tensor | None, damping: float, precision: torch.dtype
) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped H, of type ``precision``, and the damping that was needed.

    What float32 cannot factorise, float64 may: it is tried before more damping is. Where float32 can, it is good: its
    factors were off by 1e-6 (damping 0.01, condition 1e5) to 1e-4 (1e-4, 1e7).

    Args:
        h: symmetric ``[columns, columns]``, left as it is.
        diagonal: in place of its own, ``[columns]``.
        order: in which columns are factored, ``[columns]``; None for the stored order.
        damping: as a share of the diagonal's mean.
    """
    order = torch.arange(len(h), device=h.device) if order is None else order
    mean = diagonal.mean()
    while True:
        for tried in dict.fromkeys((precision, torch.float64)):
            factor = _factor(h, (diagonal + damping * mean)[order], order, tried)
            if factor is not None:
                return factor.to(precision), damping
        if damping >= _MOST_DAMPING:
            raise CholeskyError(f"its Hessian is not positive definite even with damping={damping:g}")
        damping = min(10 * damping if damping else _FIRST_DAMPING, _MOST_DAMPING)


def _factor(h: Tensor, diagonal: Tensor, order: Tensor, precision: torch.dtype) -> Tensor | None:
    """The factor for H with another diagonal, both in that order, in ``precision``; None where that fails.

    Beside H there are two matrices of its size, which may be half a gigabyte each.
    """
    turned = order.flip(0)
    reverse = h[turned[:, None], turned].to(precision)
    reverse.diagonal().copy_(diagonal.flip(0))
    with _exact_products(h):
        columns = reverse.mT  # as LAPACK has them: it works in their place
        if torch.linalg.cholesky_ex(columns, out=(columns, torch.empty((), dtype=torch.int32, device=h.device))).info:
            return None
        upper = columns.flip(0, 1)
        factor = reverse.zero_()
        factor.diagonal().fill_(1)
        torch.linalg.solve_triangular(upper.mT, factor.mT, upper=False, out=factor.mT)
    return factor if bool(torch.isfinite(factor).all()) else None


@contextmanager
def _exact_products(operand: Tensor) -> Iterator[None]:
    """Within it float32 products on a GPU are float32's, whatever torch.set_float32_matmul_precision says: a factor in
    TensorFloat-32's eleven bits need not be one, and errors are sums of many small differences.
    """
    if not operand.is_cuda:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def empty_grid(weight: Tensor, spec: WeightSpec) -> Grid:
    """Zeros for a grid that is fitted group by group."""
    return Grid(*weight.new_zeros(2, weight.shape[0], spec.groups(weight.shape[1])).float())


def round_columns(
    problem: Problem, rounder: Rounder, number_format: NumberFormat, block_size: int, fit: GroupFit | None
) -> tuple[Tensor, float]:
    """Codes ``[rows, columns]`` and the loss, the sum of all e^2.

    Columns are visited in the problem's order; grid and codes are in the stored one. ``fit`` fills in the rounder's
    grid on the way. The working copy is transposed: its columns are contiguous.
    """
    weight, order, factor = problem.weight, problem.order, problem.factor
    rows, columns = weight.shape
    work = (weight if order is None else weight[:, order]).t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=work.device)
    size = columns // rounder.grid.scale.shape[1]
    loss = work.new_zeros((), dtype=torch.float64)
    for start, end in _blocks(columns, min(block_size, rounder.widest or columns), None if fit is None else size):
        if fit is not None and start % size == 0:
            rounder.put(start // size, fit(work[start : start + size].t(), slice(start, start + size)))
        values, errors = rounder.round_block(work[start:end], factor[start:end, start:end], start)
        codes[start:end] = number_format.encode(values)
        loss += errors.square().sum()
        with _exact_products(work):
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


class Rounder:
    """Rounds columns to the grids of their groups; no allocation and few operations per column of an integer grid.

    On a GPU blocks of float32 columns take the fused sweep of :mod:`hf_lowbit.kernels.triton.columns`, where Triton
    runs: the same steps, within the last bit of a float32.

    Attributes:
        grid: of all groups, ``[rows or 1, groups]``.
        diagonal: of the factor, in the order of visits.
        widest: columns that it can take at once; None for any number.
        is_plain: whether a block's rounding is :meth:`round` of each column and nothing else.
    """

    is_plain: ClassVar[bool] = True

    def __init__(self, problem: Problem, grid: Grid, number_format: NumberFormat) -> None:
        rows, columns = problem.weight.shape
        self.grid, self._format, self._dtype = grid, number_format, problem.weight.dtype
        self._integers = number_format.is_integer_grid
        self._low, self._high = number_format.table[0].item(), number_format.table[-1].item()
        count = grid.scale.shape[1]
        stored = torch.arange(columns) if problem.order is None else problem.order.cpu()
        self._group_of = stored.div(columns // count, rounding_mode="floor").tolist()
        self.diagonal = problem.factor.diagonal().tolist()
        self._grids = Grid(*(part.t().to(self._dtype).contiguous() for part in grid))  # [groups, rows or 1] each
        self._scale, self._zero = (part.unbind() for part in self._grids)
        self._divisor = nonzero(self._grids.scale).unbind()
        self._sweep = self._fused(number_format, grid.scale.device)
        self.widest = None if self._sweep is None else _WIDEST
        self._shifted = torch.empty(rows, dtype=self._dtype, device=grid.scale.device)

    def put(self, group: int, fitted: Grid) -> None:
        """Set a group's grid, ``[rows, 1]``."""
        self.grid.scale[:, group], self.grid.zero_point[:, group] = fitted.scale[:, 0], fitted.zero_point[:, 0]
        self._refresh(group)

    def _refresh(self, group: int) -> None:
        """Read a group's grid again."""
        for own, part in zip(self._grids, self.grid, strict=True):
            own[group] = part[:, group]
        self._divisor[group].copy_(nonzero(self._scale[group]))

    def round_block(self, work: Tensor, factor: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Table values and errors ``[n, rows]`` of the n columns from a visit on, each one's error taken from those
        after it.

        Args:
            work: the columns as they are now, ``[n, rows]``; they may be changed.
            factor: their part of the factor, ``[n, n]``.
        """
        if self._sweep is not None:
            return self._sweep(work, factor, first)
        values, errors = torch.empty_like(work), torch.empty_like(work)
        for i, (w, value, error) in enumerate(zip(work, values, errors, strict=True)):
            self.round(w, first + i, value, error)
            if i + 1 < len(work):
                work[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        return values, errors

    def _fused(self, number_format: NumberFormat, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """:meth:`round_block` in one launch, where there is a kernel for it."""
        if not self.is_plain or device.type != "cuda" or self._dtype != torch.float32 or not runs_on(device):
            return None
        from hf_lowbit.kernels.triton.columns import round_columns as sweep

        groups = torch.tensor(self._group_of, dtype=torch.int32, device=device)
        levels, between = number_format.levels
        values = (number_format.table[[0, -1]] if self._integers else levels).to(device)
        boundaries = None if self._integers else between.to(device)

        def fused(work: Tensor, factor: Tensor, first: int) -> tuple[Tensor, Tensor]:
            own = groups[first : first + len(work)]
            return sweep(work, factor, self._grids.scale, self._grids.zero_point, own, values, boundaries)

        return fused

    def round(self, w: Tensor, visit: int, value: Tensor, error: Tensor) -> None:
        """Write the nearest table values of ``w`` and its errors e, ``[rows]`` each, for the column of that visit."""
        group = self._group_of[visit]
        zero = self._zero[group]
        torch.div(w, self._divisor[group], out=value).add_(zero)
        if self._integers:
            value.round_().clamp_(self._low, self._high)
        else:
            value.copy_(self._format.nearest(value))
        torch.sub(value, zero, out=self._shifted)
        torch.addcmul(w, self._shifted, self._scale[group], value=-1, out=error)
        error.div_(self.diagonal[visit])
