"""What any grid loses of many values, from running sums: no value is rounded, so that a thousand grids cost little.

Between two neighbouring boundaries of a grid all values take one level v, and lose the sum of (x - v)^2, which is
S2 - 2 v S1 + v^2 S0 with the sums of x^2, x and 1 over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST_CELLS = 1 << 21  # of all grids looked at together


class SortedValues(NamedTuple):
    """n sets of values.

    Attributes:
        values: float32 ``[n, m]``, ascending.
        sums: float64 ``[3, n, m + 1]``: of 1, x and x^2 over the first 0 .. m of them.
    """

    values: Tensor
    sums: Tensor

    @classmethod
    def of(cls, values: Tensor, counts: Tensor | None = None) -> SortedValues:
        """Sort values ``[n, m]``; or take those of a histogram, ascending already: ``[m]`` with counts ``[n, m]``."""
        if counts is None:
            values = values.float().sort(-1).values
            weights = torch.ones_like(values, dtype=torch.float64)
        else:
            values = values.float().expand(counts.shape).contiguous()
            weights = counts.double()
        exact = values.double()
        moments = torch.stack([weights, weights * exact, weights * exact.square()])
        return cls(values, torch.nn.functional.pad(moments.cumsum(-1), (1, 0)))

    def errors(self, levels: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """Sum of squared errors, float64 ``[n, k]``, on k grids of each set: scale * levels + shift.

        Args:
            levels: float32 ``[l]``, ascending.
            scale: float32 ``[n, k]``, not negative.
            shift: the same shape, or None.
        """
        step = max(1, _MOST_CELLS // (scale.shape[1] * len(levels)))
        shifts = scale.new_zeros(()).expand_as(scale) if shift is None else shift
        chunks = [slice(start, start + step) for start in range(0, len(scale), step)]
        parts = [_errors(self.values[own], self.sums[:, own], levels, scale[own], shifts[own]) for own in chunks]
        return torch.cat(parts)


def _errors(values: Tensor, sums: Tensor, levels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    n, k = scale.shape
    on_grid = scale.unsqueeze(-1) * levels + shift.unsqueeze(-1)  # [n, k, l]
    boundaries = (on_grid[..., 1:] + on_grid[..., :-1]) / 2
    inner = torch.searchsorted(values, boundaries.reshape(n, -1)).reshape(n, k, -1)
    edges = torch.nn.functional.pad(inner, (1, 0))
    edges = torch.nn.functional.pad(edges, (0, 1), value=values.shape[1]).reshape(1, n, -1)
    s0, s1, s2 = sums.gather(-1, edges.expand(3, n, -1)).reshape(3, n, k, -1).diff(dim=-1)
    v = on_grid.double()
    return (s2 + v * (v * s0 - 2 * s1)).sum(-1).clamp_(min=0)
