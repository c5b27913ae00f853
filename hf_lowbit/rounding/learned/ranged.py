"""RangedWeight: codes by rounding, on a grid from a range of learned width."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.grid import Grid
from hf_lowbit.rounding.learned.base import LearnedWeight
from hf_lowbit.rounding.learned.functions import nearest, quantize
from hf_lowbit.rounding.learned.ranges import Range, base_range


class RangedWeight(LearnedWeight):
    """What SignRound and OmniQuant share: forward already is the hard weight, its gradients are straight-through."""

    low: Tensor
    high: Tensor
    shift: nn.Parameter | None  # added before rounding, in steps

    def __init__(self, weight: Tensor, spec: WeightSpec, start: PackedTensor | None) -> None:
        super().__init__(weight, spec, start)
        self.register_parameter("shift", None)
        base = base_range(self.weight, spec, self.levels, Grid(self.base_scale, self.base_zero_point), start is None)
        self.register_buffer("low", base.low, persistent=False)
        self.register_buffer("high", base.high, persistent=False)

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None: symmetric) ``[n, groups]`` as stored, differentiable."""

    @property
    def base(self) -> Range:
        """The range before it is narrowed."""
        return Range(self.low, self.high)

    def forward(self) -> Tensor:
        return self.ungrouped(quantize(self.weight, self.shift, *self.grid(), self.levels))

    def final(self) -> tuple[Tensor, Grid]:
        scale, zero_point = self.grid()
        index = nearest(self.weight, self.shift, scale, zero_point, self.levels)
        return index, Grid(scale, torch.zeros_like(scale) if zero_point is None else zero_point)
