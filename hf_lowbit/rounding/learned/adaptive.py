"""AdaRound: every weight is rounded up or down, whichever serves the output (arXiv 2004.10568)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.formats.number_format import look_up
from hf_lowbit.rounding.grid import Grid, RoundingError
from hf_lowbit.rounding.learned.base import LearnedWeight
from hf_lowbit.rounding.learned.functions import position, stored
from hf_lowbit.rounding.learned.soft import (
    beta_at,
    interpolate,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
)


class AdaptiveRounding(LearnedWeight):
    """w_hat = s * (lower + h(a) * (upper - lower) - z), lower and upper the two levels around the weight.

    The grid is fixed; h starts at the weight itself, so that the first outputs are the float layer's but for weights
    beyond the grid, which stay at its end. Meant for Adam at 1e-3. Neighbours in any table serve as floor and ceil do
    among integers [ours]: on a floating-point grid upper - lower is the step of the weight's binade, and lower / step
    its floor (Chen et al., arXiv 2408.06995; a weight that is rounded up out of its binade is the next one's first).

    Attributes:
        lower, span: lower - z and upper - lower of each weight, float32 ``[n, groups, g]``.
        below: index of lower among the levels, uint8.
        logits: a; scale-aware, a in units of 1 / step.
    """

    lower: Tensor
    span: Tensor
    below: Tensor
    step: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        spec: WeightSpec,
        start: PackedTensor | None = None,
        *,
        regularization: float = 0.01,
        learn_scale: bool = False,
        scale_aware: bool = False,
    ) -> None:
        """Args:
            weight: ``[rows, columns]``.
            spec: format and granularity.
            start: its grid is used; its codes are not.
            regularization: lambda, the factor of the penalty that drives h to 0 or 1.
            learn_scale: also learn a factor 2 sigmoid(v) of each dequantization scale (TesseraQ, arXiv 2410.19103).
            scale_aware: learn a / step instead of a, step being the distance of the two levels (FP4DiT, arXiv
                2503.15465): at the same rate weights between close levels move farther. Small steps need few iterations
                then, and a rate that was tuned for a lets them saturate at once.

        Raises:
            RoundingError: as :class:`LearnedWeight`.
        """
        super().__init__(weight, spec, start)
        self.regularization = regularization
        where = position(self.weight, self.base_scale, self.base_zero_point, self.levels)
        below = where.floor().clamp_(0, len(self.levels) - 1)
        spans = torch.cat([self.levels.steps, self.levels.steps.new_zeros(1)])  # nothing above the last level
        beyond = (where < 0) | (where > len(self.levels) - 1)
        span = look_up(spans, below).masked_fill_(beyond, 0.0)
        self.register_buffer("below", below.to(torch.uint8), persistent=False)
        self.register_buffer("span", span, persistent=False)
        self.register_buffer("lower", look_up(self.levels.values, below), persistent=False)
        self.lower -= self.base_zero_point.unsqueeze(-1)
        fraction = (where - below).clamp_(0, 1).masked_fill_(span == 0, 0.0)
        step = (span * self.base_scale.unsqueeze(-1).abs()).masked_fill_(span == 0, 1.0) if scale_aware else None
        self.register_buffer("step", step, persistent=False)
        logits = inverse_rectified_sigmoid(fraction)
        self.logits = nn.Parameter(logits if step is None else logits * step)
        self.scale_logits = nn.Parameter(torch.zeros_like(self.base_scale)) if learn_scale else None

    def forward(self) -> Tensor:
        return self.ungrouped(interpolate(self._a(), self.lower, self.span, self._scale()))

    def final(self) -> tuple[Tensor, Grid]:
        up = (self.logits >= 0) & (self.span > 0)
        return self.below.int() + up, Grid(self._scale(), self.base_zero_point)

    def regularizer(self, progress: float) -> Tensor:
        beta = beta_at(progress)
        if beta is None or self.regularization == 0:
            return super().regularizer(progress)
        return self.regularization * rounding_penalty(rectified_sigmoid(self._a()), beta)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": [self.logits], "lr_scale": 1.0}]
        return groups + ([] if self.scale_logits is None else [{"params": [self.scale_logits], "lr_scale": 1.0}])

    @torch.no_grad()
    def harden_(self, fraction: float) -> None:
        """Fix the given share of all weights, those whose h is farthest from 1/2 first (TesseraQ's stages).

        Their logits become infinite: no gradient reaches them any more. Raises RoundingError outside 0 .. 1.
        """
        if not 0 <= fraction <= 1:
            raise RoundingError(f"the share of hardened weights must lie within 0 and 1, not {fraction}")
        count = round(fraction * self.logits.numel())
        if count:
            certainty = self._a().abs().flatten()  # h is odd around 1/2 and grows with the logit
            chosen = certainty.topk(count, sorted=False).indices
            flat = self.logits.view(-1)
            flat[chosen] = torch.where(flat[chosen] >= 0, torch.inf, -torch.inf)

    def _a(self) -> Tensor:
        return self.logits if self.step is None else self.logits / self.step

    def _scale(self) -> Tensor:
        if self.scale_logits is None:
            return self.base_scale
        return stored(2 * self.scale_logits.sigmoid() * self.base_scale, self.spec.scale_dtype)
