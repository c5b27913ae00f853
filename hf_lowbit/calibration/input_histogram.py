"""How often a layer's inputs take each value: enough to judge any quantization of them."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS, _LEAST_BITS = 16, 12  # of a float32 that tell bins apart: sign, exponent, 3 to 7 bits of the mantissa
_COUNTERS = 1 << 22  # of a layer: 32 MB


class InputHistogram:
    """Counts of values: a :class:`hf_lowbit.calibration.statistics.Statistic`.

    Values are told apart by their first 16 bits, bfloat16 numbers, so that counts are the same however the data is
    shared among batches and processes. Many timesteps and groups have coarser bins: as many bits as 4 M counters allow,
    at least 12, where a bin is an eighth of its value wide.

    Args:
        shape: of the stored scales, ``[(timesteps,) groups]``.
        counting: False keeps the ranges alone.

    Attributes:
        values: float32 ``[bins]``, ascending: the middle of each bin.
        counts: int64 ``[(timesteps,) groups, bins]``; without ``counting`` there are no bins.
    """

    def __init__(self, shape: tuple[int, ...], counting: bool = True, device: torch.device | None = None) -> None:
        self.tokens = 0
        rows = torch.Size(shape).numel()
        self._drop = 32 - max(_LEAST_BITS, min(_BITS, (_COUNTERS // rows).bit_length() - 1))
        self._half = 1 << (31 - self._drop) if counting else 0
        self._shape = shape
        self._reach = torch.full((2, rows), -torch.inf, device=device)  # of -x and of x
        self._counts = torch.zeros(rows, 2 * self._half, dtype=torch.int64, device=device)

    def update(self, x: Tensor, timestep: int | Tensor = 0) -> None:
        """Take in ``[..., columns]``.

        Args:
            timestep: which of the timesteps; of each entry of x's first dimension where they differ.
        """
        if not x.numel():
            return
        groups = self._shape[-1]
        if isinstance(timestep, Tensor):
            for index in timestep.unique().tolist():
                self.update(x[(timestep == index).to(x.device)], index)
            return
        grouped = x.detach().reshape(-1, groups, x.shape[-1] // groups).float()
        self.tokens += len(grouped)
        own = slice(timestep * groups, (timestep + 1) * groups)
        reach = torch.stack([-grouped.amin((0, 2)), grouped.amax((0, 2))])
        self._reach[:, own] = torch.maximum(self._reach[:, own], reach)
        if self._half:
            bins = 2 * self._half
            offset = torch.arange(groups, device=x.device).view(1, groups, 1) * bins
            found = torch.bincount((self._bin(grouped) + offset).reshape(-1), minlength=groups * bins)
            self._counts[own] += found.view(groups, bins)

    def summed(self) -> list[Tensor]:
        return [self._counts] if self._half else []

    def largest(self) -> list[Tensor]:
        return [self._reach]

    @property
    def low(self) -> Tensor:
        """The smallest value, exactly, float32 ``[(timesteps,) groups]``; infinite where nothing was read."""
        return -self._reach[0].reshape(self._shape)

    @property
    def high(self) -> Tensor:
        """The largest."""
        return self._reach[1].reshape(self._shape)

    @property
    def counts(self) -> Tensor:
        return self._counts.reshape(*self._shape, -1)

    @property
    def values(self) -> Tensor:
        index = torch.arange(self._half, dtype=torch.int32, device=self._counts.device)
        middle = ((index << self._drop) + (1 << (self._drop - 1))).view(torch.float32)
        middle[:1] = 0.0
        middle = middle.nan_to_num(nan=torch.finfo(torch.float32).max)  # bins of no number, always empty
        return torch.cat([-middle.flip(0), middle])

    def largest_magnitude(self, percentile: float = 100.0) -> Tensor:
        """The magnitude that covers this share of |x|, to the end of its bin: float32 ``[(timesteps,) groups]``.

        [ours; Quamba, arXiv 2410.13229, averages percentiles of samples]
        """
        largest = torch.maximum(-self.low, self.high)
        if percentile == 100:
            return largest
        magnitudes = self.counts[..., self._half :] + self.counts[..., : self._half].flip(-1)
        up_to = magnitudes.cumsum(-1).double()
        index = torch.searchsorted(up_to, up_to[..., -1:] * percentile / 100).squeeze(-1).clamp(max=self._half - 2)
        bound = ((index.to(torch.int32) + 1) << self._drop).view(torch.float32)
        return torch.minimum(bound, largest)

    def _bin(self, x: Tensor) -> Tensor:
        pattern = x.contiguous().view(torch.int32)
        magnitude = ((pattern & 0x7FFFFFFF) >> self._drop).long()
        return torch.where(pattern < 0, self._half - 1 - magnitude, self._half + magnitude)
