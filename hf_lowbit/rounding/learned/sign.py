"""SignRound: a bounded shift of each weight before rounding, and of each group's range (arXiv 2309.05516)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.grid import RoundingError
from hf_lowbit.rounding.learned.base import positions_of
from hf_lowbit.rounding.learned.functions import nearest, position
from hf_lowbit.rounding.learned.ranged import RangedWeight
from hf_lowbit.rounding.learned.ranges import narrowed

_LEAST_FACTOR = 0.05  # [ours] of the range: a group whose range vanished would never come back
_MOST_FACTOR = 2.0  # [ours] of a start's range, which may have been clipped too far
_MARGIN = 1e-3  # [ours] of a step: how far inside its cell a start's code is put at least


class SignRounding(RangedWeight):
    """w_hat = s * (clamp(round(w / s + V) + z) - z), with V in [-reach, reach], s and z from a range of learned width.

    Meant for sign-SGD on V, alpha and beta with a rate that falls linearly to zero (eq. 3 to 6). For number formats
    other than integers V is in units of the distance between the table's values around the weight [ours].
    """

    shift: nn.Parameter

    def __init__(
        self,
        weight: Tensor,
        spec: WeightSpec,
        start: PackedTensor | None = None,
        *,
        reach: float = 0.5,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 1.0,
        learn_range: bool = True,
    ) -> None:
        """Args:
            weight: ``[rows, columns]``.
            spec: format and granularity.
            start: V begins where rounding gives the start's codes, as far as ``reach`` allows.
            reach: bound of abs(V). 0.5: one of the two neighbouring values; more: codes may move further [ours].
            alpha, beta: initial factors of the range's upper and lower part, in [0.05, 1], or to 2 with a start [ours]:
                numbers, or ``[n, groups]``. Symmetric formats have alpha alone, a factor of their scale.
            learn_range: False keeps the factors.

        Raises:
            RoundingError: as :class:`LearnedWeight`, or a reach that is not positive.
        """
        super().__init__(weight, spec, start)
        if not 0 < reach < torch.inf:
            raise RoundingError(f"reach must be a positive number of steps, not {reach}")
        self.reach = reach
        self.most = 1.0 if start is None else _MOST_FACTOR
        ones = torch.ones_like(self.base_scale)
        self.alpha = nn.Parameter(ones * alpha, requires_grad=learn_range)
        self.beta = nn.Parameter(ones * beta, requires_grad=learn_range and not spec.symmetric)
        self.shift = nn.Parameter(torch.zeros_like(self.weight))
        self.constrain_()
        if start is not None:
            self.shift.data.copy_(self._shift_to(positions_of(start, self.levels, self.number_format, self.weight)))

    def grid(self) -> tuple[Tensor, Tensor | None]:
        return narrowed(self.base, self.beta, self.alpha, self.spec, self.levels, learn_zero_point=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        factors = [factor for factor in (self.alpha, self.beta) if factor.requires_grad]
        groups = [{"params": [self.shift], "lr_scale": 1.0}]
        return groups + ([{"params": factors, "lr_scale": 1.0}] if factors else [])

    @torch.no_grad()
    def constrain_(self) -> None:
        self.shift.clamp_(-self.reach, self.reach)
        self.alpha.clamp_(_LEAST_FACTOR, self.most)
        self.beta.clamp_(_LEAST_FACTOR, self.most)

    @torch.no_grad()
    def _shift_to(self, target: Tensor) -> Tensor:
        """V that rounds to ``target`` [ours]: none where w does so by itself, else w mirrored at the cell's border.

        Mirrored, a weight that the start moved a little past the border can come back as easily as it left.
        """
        grid = self.grid()
        away = target - position(self.weight, *grid, self.levels)
        inside = (2 * away.abs() - 1).maximum(away.abs() - 0.5 + _MARGIN).minimum(away.abs())
        stays = nearest(self.weight, None, *grid, self.levels) == target
        return torch.where(stays, torch.zeros_like(away), away.sign() * inside).clamp_(-self.reach, self.reach)
