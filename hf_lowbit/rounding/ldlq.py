"""LDLQ and LDLQ-RG (QuIP: Chee et al., arXiv 2307.13304): adaptive rounding within a range that the mean square sets.

With H = L D L^T, each column is rounded after the errors of the columns before it were added through L. The paper shows
that this is what GPTQ does, so that :mod:`hf_lowbit.rounding.gptq` computes it. What QuIP adds is its range
+-2.4 sqrt(mean w^2), which incoherent weights hardly leave, and greedy passes: each code in turn becomes the best one,
all others given.

[ours]: weights beyond the range saturate when their column is rounded, and later columns make up for it; the authors
clamp them first, which left up to twice the error at 4 bits (layers of SmolLM2-135M). A pass goes by the weights that
are really stored; in the authors' code its running error is not updated where a code saturates.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, decode
from hf_lowbit.formats.packed import scales, table_of, zero_points
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit.rounding.grid import Grid, fit_grid, grid_of_range, is_laid_on_the_range, nonzero
from hf_lowbit.rounding.store import round_to_grid

_BLOCK = 128


def ldlq(
    weight: Tensor,
    spec: WeightSpec,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    reach: float | None = 2.4,
    greedy_passes: int = 0,
) -> GPTQResult:
    """Round an incoherent matrix; arguments and errors as :func:`hf_lowbit.rounding.gptq.gptq`.

    Args:
        reach: end of each group's range, in root mean squares; None searches the range of least error [ours].
        greedy_passes: after the rounding, at most; with any, columns of the largest diagonal are rounded first
            (LDLQ-RG).
    """
    fit = fit_clipped if reach is None else partial(fit_mean_square, reach=reach)
    result = gptq(weight, spec, hessian, damping=damping, act_order=greedy_passes > 0, grid_fit=fit)
    if not greedy_passes:
        return result
    h = hessian.float().to(weight.device, copy=True)
    h.diagonal().add_(result.damping * h.diagonal().mean())
    packed, loss = improve_greedily(weight, result.packed, h, greedy_passes)
    return GPTQResult(packed, loss, result.damping)


def fit_mean_square(
    grouped: Tensor,
    spec: WeightSpec,
    number_format: NumberFormat,
    importance: Tensor | None = None,
    reach: float = 2.4,
) -> Grid:
    """The grid over +-``reach`` root mean squares of each group ``[rows, groups, g]``; ``importance`` is not read.

    Integers with a real zero point get 2^b levels around zero, none of them zero. Formats whose grid does not follow a
    range (ternary, one bit) keep their own.

    Raises:
        RoundingError: as :func:`hf_lowbit.rounding.grid.fit_grid`.
    """
    if not is_laid_on_the_range(number_format):
        return fit_grid(grouped, spec, number_format)
    high = reach * grouped.square().mean(-1).sqrt()
    return grid_of_range(-high, high, spec, number_format)


def improve_greedily(weight: Tensor, packed: PackedTensor, hessian: Tensor, passes: int) -> tuple[PackedTensor, float]:
    """Coordinate descent on tr((Q - W) H (Q - W)^T): each column's codes become the best ones, all others given.

    Args:
        weight: ``[rows, columns]``.
        packed: its codes; the grid stays.
        hessian: damped as it was for them.
        passes: over all columns, at most: it ends where nothing changes any more.

    Returns:
        The codes, and what is left of the trace, which never grows.
    """
    spec = packed.spec
    table = table_of(packed) if spec.has_fitted_table else None
    number_format = spec.number_format if table is None else NumberFormat("codebook", spec.bits, table)
    zero = zero_points(packed)
    grid = Grid(scales(packed), torch.zeros_like(scales(packed)) if zero is None else zero)
    h = hessian.to(torch.promote_types(weight.dtype, torch.float32))
    values = decode(packed).to(h.dtype).t().contiguous()  # [columns, rows]: columns are contiguous
    errors = values - weight.to(h.dtype).t()
    for _ in range(passes):
        if not _pass(values, errors, h, grid, number_format):
            break
    improved = round_to_grid(values.t(), grid, spec, number_format, table)
    return improved, float(((h @ errors) * errors).sum())


def _pass(values: Tensor, errors: Tensor, h: Tensor, grid: Grid, number_format: NumberFormat) -> bool:
    """One pass over ``[columns, rows]`` in place; whether any value changed."""
    columns = len(values)
    size = columns // grid.scale.shape[1]
    diagonal = h.diagonal().tolist()
    changed = values.new_zeros((), dtype=torch.bool)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        gradients = h[start:end] @ errors  # of half the trace; within the block kept up to date below
        for i in range(start, end):
            scale, zero = (part[:, i // size].to(h.dtype) for part in grid)
            best = torch.sub(values[i], gradients[i - start], alpha=1 / diagonal[i])
            units = number_format.nearest(best / nonzero(scale) + zero)
            step = (units - zero) * scale - values[i]
            values[i] += step
            errors[i] += step
            gradients[i - start + 1 :].addr_(h[i + 1 : end, i], step)
            changed |= step.any()
    return bool(changed)
