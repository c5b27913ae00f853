"""Learned weight clipping of OmniQuant: the range of each group, by two logits (arXiv 2308.13137)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.learned.ranged import RangedWeight
from hf_lowbit.rounding.learned.ranges import narrowed


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
        lower, upper = self.lower.sigmoid(), self.upper.sigmoid()
        return narrowed(self.base, lower, upper, self.spec, self.levels, learn_zero_point=False)
