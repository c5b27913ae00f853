"""Learned weight clipping of OmniQuant: the range of each group, by two logits (arXiv 2308.13137)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.grid import Grid
from hf_lowbit.rounding.learned.functions import nearest, quantize
from hf_lowbit.rounding.learned.ranged import RangedWeight
from hf_lowbit.rounding.learned.ranges import Range, moving_range, narrowed


class LearnedClipping(RangedWeight):
    """Round to nearest in a range sigmoid(l) * min .. sigmoid(u) * max; rounding straight through, z without gradient.

    Infinite logits give round to nearest; symmetric formats have u alone, for their scale. Meant for AdamW at 1e-2.
    """

    def __init__(
        self, weight: Tensor, spec: WeightSpec, start: PackedTensor | None = None, *, logit: float = 4.0
    ) -> None:
        """Args:
            weight: ``[rows, columns]``.
            spec: format and granularity.
            start: its grid is the range that is clipped; its codes are not used.
            logit: initial u and l; 4 keeps 98.2 % of the range.

        Raises:
            RoundingError: as :class:`LearnedWeight`.
        """
        super().__init__(weight, spec, start)
        self.upper = nn.Parameter(torch.full_like(self.base_scale, logit))
        self.lower = nn.Parameter(torch.full_like(self.base_scale, logit), requires_grad=not spec.symmetric)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.upper] + ([] if self.spec.symmetric else [self.lower]), "lr_scale": 1.0}]

    def grid(self) -> tuple[Tensor, Tensor | None]:
        return self.narrowed(self.base)

    def narrowed(self, base: Range) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a range that the logits narrow."""
        lower, upper = self.lower.sigmoid(), self.upper.sigmoid()
        return narrowed(base, lower, upper, self.spec, self.levels, learn_zero_point=False)


class MovingClipping(LearnedClipping):
    """Learned clipping of a weight that is itself rewritten by what else is learned (OmniQuant's LET).

    Gradients pass the rounding, within the range, and the ends of the range, to whatever moves the weight.
    """

    def __init__(
        self, weight: Tensor, spec: WeightSpec, rewrite: Callable[[Tensor], Tensor], *, logit: float = 4.0
    ) -> None:
        """Args:
            weight: ``[rows, columns]``, before it is rewritten.
            spec: format and granularity.
            rewrite: weight ``[rows, columns]`` -> what it is now, of the same shape.
            logit: as :class:`LearnedClipping`.

        Raises:
            RoundingError: as :class:`LearnedWeight`.
        """
        super().__init__(weight, spec, logit=logit)
        self.rewrite = rewrite

    def moved(self) -> Tensor:
        """The weight now, ``[n, groups, g]``."""
        return self.rewrite(self.ungrouped(self.weight)).reshape(self.weight.shape)

    def grid_of(self, moved: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for it."""
        return self.narrowed(moving_range(moved, self.spec, self.number_format, self.levels))

    def forward(self) -> Tensor:
        moved = self.moved()
        return self.ungrouped(quantize(moved, None, *self.grid_of(moved), self.levels))

    def final(self) -> tuple[Tensor, Grid]:
        moved = self.moved()
        scale, zero_point = self.grid_of(moved)
        index = nearest(moved, None, scale, zero_point, self.levels)
        return index, Grid(scale, torch.zeros_like(scale) if zero_point is None else zero_point)
