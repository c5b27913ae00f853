"""Information calibration: every group gets the grid whose codes have the largest entropy (IR-QLoRA, arXiv 2402.05445).

A table such as NF4 is shifted by tau: w_hat = scale * table[code] + tau, stored as a real zero point. Candidates lie
around the group's median tau0 (section 3.2): tau = tau0 + f * A with A = max|w - tau0| and even steps of f within
tau_range * sigma, sigma = 1 / 1.8481 being the deviation of a normal variable in units of NF4's largest value; each has
the scale that its largest |w - tau| asks for. Integers have ranges multiplied by 0.9 to 1.1 instead (the authors'
integer quantizer, which does so per row).

The largest entropy is not the least squared error, and may well have a larger one.

[ours]: entropies are counted from sorted groups, a search per boundary of the table instead of a code per weight; of
equals the first counts, as in the authors' code. Where a group lies far from zero its scale is at least |tau| / 4: the
zero points of many groups share a range when they are stored as codes, and a constant group has no scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec
from hf_lowbit.rounding.grid import Grid, fit_grid, grid_of_range, is_laid_on_the_range, shifted_grid

_SIGMA = 0.5410949  # 1 / ppf(0.9677083), NF4's outermost quantile
_FARTHEST = 4.0  # zero points in units of the table's largest value
_INTEGER_RANGES = [0.9 + 0.002 * step for step in range(101)]


def fit_entropy(
    grouped: Tensor,
    spec: WeightSpec,
    number_format: NumberFormat,
    importance: Tensor | None = None,
    *,
    tau_range: float = 0.1,
    steps: int = 100,
) -> Grid:
    """The grid of each group with the largest entropy of its codes; ``importance`` is not read.

    Args:
        grouped: float32 ``[rows, groups, g]``.
        spec: one with zero points; formats whose grid does not follow the range (ternary, one bit) keep their own.
        tau_range: largest shift from the median, in deviations of the group.
        steps: candidates on either side of it.

    Raises:
        RoundingError: as :func:`hf_lowbit.rounding.grid.fit_grid`.
    """
    best = fit_grid(grouped, spec, number_format)  # refuses what is not finite
    if not is_laid_on_the_range(number_format):
        return best
    ordered = grouped.sort(-1).values
    if spec.has_integer_zero_point:
        candidates = _scaled_ranges(ordered, spec, number_format)
    else:
        candidates = _shifted_tables(ordered, spec, number_format, tau_range * _SIGMA, steps)
    entropy = torch.full(grouped.shape[:-1], -torch.inf, device=grouped.device)
    for grid in candidates:
        found = code_entropy(ordered, grid, number_format)
        better = found > entropy
        entropy = torch.where(better, found, entropy)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
    return best


def code_entropy(ordered: Tensor, grid: Grid, number_format: NumberFormat) -> Tensor:
    """Shannon entropy of each group's codes, float32 ``[rows, groups]``: 0 to the format's bits.

    Args:
        ordered: float32 ``[rows, groups, g]``, ascending within each group.
        grid: ``[rows, groups]``.
    """
    values = number_format.table[torch.isfinite(number_format.table)].unique().to(ordered.device)
    middles = (values[1:] + values[:-1]) / 2
    edges = (middles - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
    below = torch.searchsorted(ordered.contiguous(), edges.contiguous(), out_int32=True)
    size = ordered.shape[-1]
    ends = below.new_tensor([0, size]).expand(*below.shape[:-1], 2)
    counts = torch.cat([ends[..., :1], below, ends[..., 1:]], -1).diff()
    share = torch.arange(size + 1, device=ordered.device) / size
    return -torch.special.xlogy(share, share).div(torch.log(torch.tensor(2.0)))[counts].sum(-1)


def _shifted_tables(
    ordered: Tensor, spec: WeightSpec, number_format: NumberFormat, reach: float, steps: int
) -> Iterator[Grid]:
    low, high = ordered[..., 0], ordered[..., -1]
    median = ordered[..., (ordered.shape[-1] - 1) // 2]  # the lower one, as torch.median
    size = torch.maximum(high - median, median - low)
    for factor in torch.linspace(-reach, reach, 2 * steps + 1).tolist():
        tau = median + factor * size
        largest = torch.maximum(high - tau, tau - low)
        yield shifted_grid(torch.maximum(largest, tau.abs() / _FARTHEST) / number_format.max_value, tau, spec)


def _scaled_ranges(ordered: Tensor, spec: WeightSpec, number_format: NumberFormat) -> Iterator[Grid]:
    low, high = ordered[..., 0], ordered[..., -1]
    for factor in _INTEGER_RANGES:
        yield grid_of_range(factor * low, factor * high, spec, number_format)
