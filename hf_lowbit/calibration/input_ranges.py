"""Searched ranges of static inputs: what the largest lose by saturating, the others win in resolution."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowbit.calibration.fitting import fit_range
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import integer_grid, quantize_tokens, restore_tokens

if TYPE_CHECKING:
    from hf_lowbit.calibration.static_inputs import InputHistogram

_SHRINKS = tuple(1 - 0.01 * step for step in range(80))
_NORM = 2.4


def search_range(histogram: InputHistogram, spec: ActivationSpec) -> tuple[ActivationSpec, Tensor, Tensor | None]:
    """The range with the least sum of |x - x_hat|^2.4 of 80, the whole one shrunk towards zero in steps of 1 %.

    Q-Diffusion's search (arXiv 2302.04304; "mse" in the authors' code, which searches inputs and weights alike), for
    each timestep and group by itself: a :class:`hf_lowbit.calibration.fitting.FitInputs`.

    Args:
        spec: symmetric, or with a zero point; a floating-point format's shift stays that of the whole range.
    """
    _, scale, shift = fit_range(histogram, spec)
    shape, rows = scale.shape, scale.numel()
    counts = histogram.counts.reshape(rows, -1)
    occurring = counts.sum(0) > 0
    values, counts = histogram.values[occurring].repeat(rows).unsqueeze(0), counts[:, occurring].float()
    by_row = replace(spec, group_size=counts.shape[1], timesteps=None)
    whole = _Grid(scale.flatten(), None if shift is None else shift.flatten())
    best, least = whole, torch.full_like(whole.scale, torch.inf, dtype=torch.float64)
    for shrink in _SHRINKS:
        grid = whole.shrunk(shrink, spec, histogram.low.flatten(), histogram.high.flatten())
        difference = restore_tokens(*quantize_tokens(values, by_row, grid.scale, grid.shift)).sub_(values)
        errors = difference.abs_().pow_(_NORM).view_as(counts).mul_(counts).sum(-1, dtype=torch.float64)
        better = errors < least
        best, least = grid.where(better, best), torch.where(better, errors, least)
    return spec, best.scale.reshape(shape), None if best.shift is None else best.shift.reshape(shape)


class _Grid:
    """Scales and shifts ``[rows]`` of as many distributions."""

    def __init__(self, scale: Tensor, shift: Tensor | None) -> None:
        self.scale, self.shift = scale, shift

    def shrunk(self, factor: float, spec: ActivationSpec, low: Tensor, high: Tensor) -> _Grid:
        """Of ranges that are so much smaller; those of nothing but zeros stay."""
        if spec.symmetric or self.shift is None:
            return _Grid(factor * self.scale, self.shift)
        idle = (low == 0) & (high == 0)
        return _Grid(*integer_grid(factor * low, factor * high, spec.bits)).where(~idle, self)

    def where(self, chosen: Tensor, other: _Grid) -> _Grid:
        """These where ``chosen``, else the other ones."""
        shifts = (self.shift, other.shift)
        shift = None if shifts[0] is None or shifts[1] is None else torch.where(chosen, shifts[0], shifts[1])
        return _Grid(torch.where(chosen, self.scale, other.scale), shift)
