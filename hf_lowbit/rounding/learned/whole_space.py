"""NUPES: power-format codes learned over the whole code range, and the exponent with them (arXiv 2308.05600).

A re-implementation from the description: no authors' code is public, and what is marked [ours] fills its gaps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.grid import Grid, RoundingError
from hf_lowbit.rounding.learned.base import LearnedWeight, positions_of
from hf_lowbit.rounding.learned.functions import position, stored
from hf_lowbit.rounding.learned.levels import Levels
from hf_lowbit.rounding.learned.power import FIRST_TEMPERATURE, LAST_TEMPERATURE, soft_power
from hf_lowbit.rounding.learned.soft import beta_at, rounding_penalty

_LOW, _HIGH = 0.2, 1.0  # the exponent is 0.2 + 0.8 sigmoid(t)
_INSET = 0.005  # exponents at the ends of that range start this far inside: sigmoid is flat at infinity
_CELL = 0.45  # a start's code is kept: u begins within this distance of it


class WholeSpaceRounding(LearnedWeight):
    """w_hat = m sign(k) (abs(k) / qmax)^(1/a), k a soft rounding of the free u, m the group's largest magnitude.

    Unlike a rounding bit, u may cross several codes: changing the exponent a moves weights that far. Meant for Adam at
    1e-3, the exponent at a tenth of it. Needs :meth:`anneal_`, which makes the soft rounding hard.
    """

    def __init__(
        self,
        weight: Tensor,
        spec: WeightSpec,
        start: PackedTensor | None = None,
        *,
        regularization: float = 0.01,
        learn_exponent: bool = True,
        learn_scale: bool = False,
        partner: WholeSpaceRounding | None = None,
    ) -> None:
        """Args:
            weight: ``[rows, columns]``.
            spec: format "power", symmetric; its exponent, within 0.2 and 1, is where learning starts.
            start: its grid, and u begins inside the cells of its codes.
            regularization: lambda, the factor of the penalty that drives u to integers.
            learn_exponent: False keeps the exponent of the spec, of any size, to the last bit.
            learn_scale: also learn a factor 2 sigmoid(v) of each m, as :class:`AdaptiveRounding` does.
            partner: a weight whose learned exponent is this one's too, as experts of one stack have it.

        Raises:
            RoundingError: as :class:`LearnedWeight`; another format, a zero point or an exponent out of range; a
                partner of another spec.
        """
        if spec.format != "power" or not spec.symmetric:
            raise RoundingError(f"whole-space rounding needs format 'power' with symmetric=True, not {spec.json}")
        super().__init__(weight, spec, start)
        assert spec.exponent is not None  # else it was refused as open
        if learn_exponent and not _LOW <= spec.exponent <= _HIGH:
            raise RoundingError(f"whole-space rounding learns exponents from {_LOW} to {_HIGH}, not {spec.exponent}")
        if partner is not None and partner.spec != spec:
            raise RoundingError(
                f"weights that share an exponent have one spec, not {partner.spec.json} and {spec.json}"
            )
        self.regularization = regularization
        self.temperature = FIRST_TEMPERATURE
        self.qmax = 2 ** (spec.bits - 1) - 1
        self.leads = learn_exponent and partner is None
        self.exponent_logit: nn.Parameter | None = None
        if self.leads:
            share = (min(max(spec.exponent, _LOW + _INSET), _HIGH - _INSET) - _LOW) / (_HIGH - _LOW)
            self.exponent_logit = nn.Parameter(torch.logit(torch.tensor(share, device=weight.device)))
        elif learn_exponent and partner is not None:
            self.exponent_logit = partner.exponent_logit
        self.scale_logits = nn.Parameter(torch.zeros_like(self.base_scale)) if learn_scale else None
        where = position(self.weight, self.base_scale, None, self.levels).clamp_(0, 2 * self.qmax)
        if start is not None:
            codes = positions_of(start, self.levels, self.number_format, self.weight)
            where = torch.maximum(torch.minimum(where, codes + _CELL), codes - _CELL).clamp_(0, 2 * self.qmax)
        self.codes = nn.Parameter(where - self.qmax)

    @property
    def exponent(self) -> Tensor:
        """The exponent a, a scalar, differentiable where it is learned."""
        if self.exponent_logit is None:
            return torch.tensor(self.spec.exponent, dtype=torch.float64, device=self.weight.device)
        return _LOW + (_HIGH - _LOW) * self.exponent_logit.sigmoid()

    @property
    def result_spec(self) -> WeightSpec:
        """The spec with the learned exponent."""
        if self.exponent_logit is None:
            return self.spec
        return replace(self.spec, exponent=float(self.exponent.detach()))

    def forward(self) -> Tensor:
        return self.ungrouped(soft_power(self.codes, self.exponent, self._scale(), self.qmax, self.temperature))

    def final(self) -> tuple[Tensor, Grid]:
        """As every kind's; also makes the number format that of the learned exponent."""
        self.number_format = self.result_spec.number_format
        self.levels = Levels(self.number_format, self.weight.device)
        index = self.codes.round().clamp(-self.qmax, self.qmax).int() + self.qmax
        return index, Grid(self._scale(), self.base_zero_point)

    def regularizer(self, progress: float) -> Tensor:
        beta = beta_at(progress)
        if beta is None or self.regularization == 0:
            return super().regularizer(progress)
        return self.regularization * rounding_penalty(self.codes - self.codes.detach().floor(), beta)

    def anneal_(self, progress: float) -> None:
        """Lower the temperature of the soft rounding, geometrically, to where half of all fractions are hard [ours]."""
        self.temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** min(1.0, progress)

    def parameter_groups(self) -> list[dict[str, Any]]:
        scales = [] if self.scale_logits is None else [self.scale_logits]
        groups = [{"params": [self.codes, *scales], "lr_scale": 1.0}]
        return groups + ([{"params": [self.exponent_logit], "lr_scale": 0.1}] if self.leads else [])

    @torch.no_grad()
    def constrain_(self) -> None:
        self.codes.clamp_(-self.qmax, self.qmax)

    def _scale(self) -> Tensor:
        if self.scale_logits is None:
            return self.base_scale
        return stored(2 * self.scale_logits.sigmoid() * self.base_scale, self.spec.scale_dtype)
