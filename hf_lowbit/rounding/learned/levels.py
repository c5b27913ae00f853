"""The values of a number format in ascending order, and where a weight lies between them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat
from hf_lowbit.formats.number_format import look_up

_MOST_BINS = 1 << 16  # their counts stay in a core's second cache


class Levels:
    """What learned rounding needs of a number format of n distinct finite values.

    Between two values, positions 0 .. n-1 are interpolated linearly [ours], so that rounding a position to an integer
    takes the nearest value, whatever the distances between the values are.

    Attributes:
        values: float32 ``[n]``, ascending.
        steps: float32 ``[n - 1]``, their distances.
        codes: uint8 ``[n]``, the code of each.
        low, high: the first and the last of the values.
        uniform: True for the integers of two and more bits.
    """

    def __init__(self, number_format: NumberFormat, device: torch.device) -> None:
        table = number_format.table
        values = torch.unique(table[torch.isfinite(table)] + 0.0)  # + 0.0 turns -0 into +0
        self.uniform = number_format.is_integer_grid
        self.values = values.to(device)
        self.low, self.high = values[0].item(), values[-1].item()
        self.steps = values.diff().to(device)
        self.codes = number_format.encode(values).to(device)
        self._inner = _Count(self.values[1:-1])

    def __len__(self) -> int:
        return len(self.values)

    def interval(self, x: Tensor) -> Tensor:
        """int32 index of the last value that is not above ``x``, within 0 .. n-2."""
        return self._inner(x)

    def value(self, position: Tensor) -> Tensor:
        """Value at each position, rounded to the nearest one and kept within the table."""
        return look_up(self.values, self.nearest(position))

    def nearest(self, position: Tensor) -> Tensor:
        """int32 index of the value nearest to a real position; 0 for NaN, which no index may become."""
        return position.round().clamp_(0, len(self) - 1).int().clamp_(min=0)

    def position_of_code(self, codes: Tensor, number_format: NumberFormat) -> Tensor:
        """int64 position of each code."""
        return torch.searchsorted(self.values, number_format.decode(codes) + 0.0)


class _Count:
    """Number of ascending edges that are not above x: a table look-up and one comparison instead of a search.

    x falls into one of many equal bins; the map to bins never decreases, so that edges in lower bins are counted
    without comparing, and at most one edge shares x's bin. Exact, and several times faster than ``torch.bucketize``,
    whose branches cannot be predicted; edges too close together for that are left to it.
    """

    def __init__(self, edges: Tensor) -> None:
        self.edges = edges
        self.padded = torch.cat([edges, edges.new_tensor([torch.inf])])
        self.first: Tensor | None = None
        bins = 64
        while len(edges) and bins <= _MOST_BINS:
            self.shift, self.factor, self.last = edges[0].item(), _bins_per_unit(edges, bins), bins - 1
            bin_of_edge = self._bin(edges)
            if bool((bin_of_edge.diff() > 0).all()):
                every_bin = torch.arange(bins, device=edges.device, dtype=torch.int32)
                self.first = torch.searchsorted(bin_of_edge, every_bin, out_int32=True)
                return
            bins *= 2

    def __call__(self, x: Tensor) -> Tensor:
        if not len(self.edges):
            return torch.zeros_like(x, dtype=torch.int32)
        if self.first is None or x.dtype != self.edges.dtype:
            return torch.bucketize(x.contiguous(), self.edges.to(x.dtype), out_int32=True, right=True)
        count = look_up(self.first, self._bin(x))
        return count.add_((x >= look_up(self.padded, count)).view(torch.uint8))

    def _bin(self, x: Tensor) -> Tensor:
        return ((x - self.shift) * self.factor).clamp_(0, self.last).int().clamp_(min=0)  # NaN falls into the first


def _bins_per_unit(edges: Tensor, bins: int) -> float:
    span = (edges[-1] - edges[0]).item()
    return (bins - 1) / span if span else 1.0
