"""The magnitude that covers a share of |x|: of all data, or a running mean of that of each sample (Quamba).

Both are observers: statistics whose ``limit`` is what scales are made of.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hf_lowbit.calibration.input_histogram import InputHistogram
from hf_lowbit.calibration.parallel import in_order
from hf_lowbit.calibration.statistics import Statistic


class Observer(Statistic, Protocol):
    """A statistic of values ``[samples, ...]`` that ends in a magnitude."""

    @property
    def limit(self) -> Tensor:
        """What the scale's largest code stands for, float32."""


def magnitude_quantile(x: Tensor, percentile: float) -> Tensor:
    """The percentile of |x| of every row, ``[rows, values]`` -> ``[rows]``, between two values in proportion.

    What ``torch.quantile`` returns, which refuses more than 2^24 values.
    """
    magnitude = x.abs()
    place = percentile / 100 * (magnitude.shape[1] - 1)
    below = math.floor(place)
    low = magnitude.kthvalue(below + 1).values
    return low if below == place else low.lerp(magnitude.kthvalue(below + 2).values, place - below)


class RunningPercentile:
    """m <- m + sigma (p - m), p each sample's percentile of |x|, from the first sample's (Quamba's observer [code]).

    It depends on the order of samples, on the first of them most: with sigma = 0.01 a hundred samples later a third of
    the first one's percentile is left. Several processes give what one does.

    Args:
        percentile: 0 < percentile <= 100; 100 is a sample's largest |x|.
        sigma: 0 < sigma <= 1; with 1 the last sample decides.
    """

    def __init__(self, percentile: float, sigma: float) -> None:
        self.tokens = 0
        self._percentile, self._sigma = percentile, sigma
        self._batches: list[list[float]] = []

    def update(self, x: Tensor) -> None:
        """Take in samples ``[samples, ...]``."""
        if not x.numel():
            return
        self.tokens += x.shape[0] * x.shape[1]
        self._batches.append(magnitude_quantile(x.detach().float().flatten(1), self._percentile).tolist())

    def summed(self) -> list[Tensor]:
        return []

    def largest(self) -> list[Tensor]:
        return []

    @property
    def limit(self) -> Tensor:
        """float32 ``[1]``; zero where no sample was seen. In several processes all of them ask, at the same point."""
        samples = [value for batch in in_order(self._batches) for value in batch]
        mean = samples[0] if samples else 0.0
        for value in samples[1:]:
            mean += self._sigma * (value - mean)
        return torch.tensor([mean])


class OverallPercentile(InputHistogram):
    """The percentile of |x| over all data, whatever the order, to within a bfloat16 number [ours]."""

    def __init__(self, percentile: float, device: torch.device | None = None) -> None:
        super().__init__((1,), percentile < 100, device)
        self._percentile = percentile

    @property
    def limit(self) -> Tensor:
        """float32 ``[1]``; infinite where nothing was read."""
        return self.largest_magnitude(self._percentile)
