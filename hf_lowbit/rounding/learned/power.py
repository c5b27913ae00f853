"""Soft power-format values with closed-form gradients for codes, exponent and scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hf_lowbit.formats.number_format import look_up
from hf_lowbit.rounding.learned.soft import GAMMA, ZETA, inverse_rectified_sigmoid

# At the first temperature the soft fraction of 0 is just 0 and that of 1 just 1: nearly the identity.
FIRST_TEMPERATURE = 0.5 / inverse_rectified_sigmoid(torch.tensor(1.0, dtype=torch.float64)).item()
LAST_TEMPERATURE = 0.1  # a fraction within 0.26 of an integer becomes it; colder ones trained worse on small layers


def soft_power(codes: Tensor, exponent: Tensor, scale: Tensor, qmax: int, temperature: float) -> Tensor:
    """scale * T(softly rounded codes), where T(k) = sign(k) (abs(k) / qmax)^(1/a).

    T is interpolated linearly between codes [ours]. The gradient takes soft rounding for the identity, so that codes
    can cross integers, and is the slope between the two neighbouring codes: the curve's own vanishes at zero, where
    codes would be stuck [ours].

    Args:
        codes: ``[n, groups, g]`` within -qmax .. qmax.
        exponent: a, a positive scalar.
        scale: ``[n, groups]``.
        temperature: of the rectified sigmoid that softens rounding; towards 0 it is hard.
    """
    return _SoftPower.apply(codes, exponent, scale, qmax, temperature)


def power_values(exponent: Tensor, qmax: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """T and dT/da ``[2 qmax + 1]`` of the codes -qmax .. qmax, computed in float64 as the format's own table is.

    dT/da = -T log(abs(k) / qmax) / a^2, zero for the code 0, where the logarithm does not exist.
    """
    a = exponent.double()
    k = torch.arange(-qmax, qmax + 1, dtype=torch.float64, device=exponent.device)
    magnitude = k.abs() / qmax
    values = k.sign() * magnitude.pow(1 / a)
    slopes = -values * torch.where(k == 0, torch.ones_like(k), magnitude).log() / a.square()
    return values.to(dtype), slopes.to(dtype)


class _SoftPower(Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, exponent: Tensor, scale: Tensor, qmax: int, temperature: float) -> Tensor:
        position = codes + qmax
        below = position.floor().clamp_(0, 2 * qmax - 1)
        fraction = position.sub_(below).sub_(0.5).div_(temperature).sigmoid_()
        fraction.mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)
        values, slopes = power_values(exponent.detach(), qmax, codes.dtype)
        ctx.save_for_backward(below.to(torch.uint8), fraction, scale, values, slopes)
        return _between(values, below, fraction).mul_(scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        below, fraction, scale, values, slopes = ctx.saved_tensors
        scaled = gradient * scale.unsqueeze(-1)
        to_exponent = (_between(slopes, below, fraction) * scaled).sum() if ctx.needs_input_grad[1] else None
        to_scale = _between(values, below, fraction).mul_(gradient).sum(-1) if ctx.needs_input_grad[2] else None
        return scaled.mul_(look_up(values.diff(), below)), to_exponent, to_scale, None, None


def _between(values: Tensor, below: Tensor, fraction: Tensor) -> Tensor:
    return look_up(values.diff(), below).mul_(fraction).add_(look_up(values, below))
