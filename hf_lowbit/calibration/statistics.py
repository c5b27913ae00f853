"""What calibration remembers of a layer's inputs: running sums, exact over processes as over batches."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_BLOCK = 512


class Statistic(Protocol):
    """A running statistic of inputs ``[tokens, channels]``."""

    tokens: int

    def update(self, x: Tensor) -> None:
        """Take in more tokens, float32."""

    def summed(self) -> list[Tensor]:
        """Tensors to add up over processes."""

    def largest(self) -> list[Tensor]:
        """Tensors of which processes keep the largest."""


class Hessian:
    """H = X^T X / tokens ``[channels, channels]`` float32: half the Hessian of the mean squared output error (GPTQ).

    Only blocks on and above the diagonal are computed; the rest is their mirror image.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(channels, channels, device=device)

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        channels = x.shape[1]
        for start in range(0, channels, _BLOCK):
            rows = slice(start, min(start + _BLOCK, channels))
            self._sum[rows, start:].addmm_(x[:, rows].t(), x[:, start:])

    def summed(self) -> list[Tensor]:
        return [self._sum]

    def largest(self) -> list[Tensor]:
        return []

    @property
    def matrix(self) -> Tensor:
        """The whole symmetric matrix, a mean over tokens."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).t()) / max(1, self.tokens)


class Magnitude:
    """Mean and largest |x| of every channel, float32 ``[channels]`` (AWQ's and SmoothQuant's statistics)."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(channels, device=device)
        self._largest = torch.zeros(channels, device=device)

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        magnitude = x.abs()
        self._sum += magnitude.sum(0)
        if x.shape[0]:
            self._largest = torch.maximum(self._largest, magnitude.amax(0))

    def summed(self) -> list[Tensor]:
        return [self._sum]

    def largest(self) -> list[Tensor]:
        return [self._largest]

    @property
    def mean(self) -> Tensor:
        """Mean |x|."""
        return self._sum / max(1, self.tokens)

    @property
    def maximum(self) -> Tensor:
        """Largest |x|."""
        return self._largest


class SecondMoment:
    """Mean of x^2 of every channel, float32 ``[channels]``: the diagonal of :class:`Hessian` (QERA-approx)."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(channels, device=device)

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        self._sum += x.square().sum(0)

    def summed(self) -> list[Tensor]:
        return [self._sum]

    def largest(self) -> list[Tensor]:
        return []

    @property
    def mean(self) -> Tensor:
        """Mean x^2."""
        return self._sum / max(1, self.tokens)


class BatchMagnitude:
    """The largest over batches of a channel's mean |x|, float32 ``[channels]`` (L2QER)."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self.maximum = torch.zeros(channels, device=device)

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        if x.shape[0]:
            self.maximum = torch.maximum(self.maximum, x.abs().mean(0))

    def summed(self) -> list[Tensor]:
        return []

    def largest(self) -> list[Tensor]:
        return [self.maximum]


class MeanPeak:
    """Mean over batches of a channel's largest |x|, float32 ``[channels]`` (ViDiT-Q, arXiv 2406.02540).

    [ours]: a plain mean, the same in whatever order batches come; the authors' code has a running mean with momentum
    0.95, and takes peaks sample by sample.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._sum = torch.zeros(channels, device=device)
        self._batches = torch.zeros(1, device=device)

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        if x.shape[0]:
            self._sum += x.abs().amax(0)
            self._batches += 1

    def summed(self) -> list[Tensor]:
        return [self._sum, self._batches]

    def largest(self) -> list[Tensor]:
        return []

    @property
    def maximum(self) -> Tensor:
        """The mean of the peaks."""
        return self._sum / self._batches.clamp(min=1)


class Extremes:
    """Least and largest x of every channel, float32 ``[channels]`` (OmniQuant's shifts)."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.tokens = 0
        self.most = torch.full((channels,), -torch.inf, device=device)
        self._below = torch.full((channels,), -torch.inf, device=device)  # -least: of processes the largest counts

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0]
        if x.shape[0]:
            self.most = torch.maximum(self.most, x.amax(0))
            self._below = torch.maximum(self._below, -x.amin(0))

    def summed(self) -> list[Tensor]:
        return []

    def largest(self) -> list[Tensor]:
        return [self.most, self._below]

    @property
    def least(self) -> Tensor:
        """Smallest x."""
        return -self._below
