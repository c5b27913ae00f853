"""Soft rounding: a fraction between two neighbouring levels that training drives to 0 or 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

GAMMA, ZETA = -0.1, 1.1  # stretch of the rectified sigmoid (AdaRound, arXiv 2004.10568, eq. 23)
_WARMUP, FIRST_BETA, LAST_BETA = 0.2, 20.0, 2.0

_where_within = torch.ops.aten.hardtanh_backward
_sigmoid_gradient = torch.ops.aten.sigmoid_backward


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(a) = clamp(sigmoid(a) * (zeta - gamma) + gamma, 0, 1)."""
    return torch.nn.functional.hardtanh(logits.sigmoid() * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_rectified_sigmoid(fraction: Tensor) -> Tensor:
    """The logits whose h is ``fraction``, in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def beta_at(progress: float) -> float | None:
    """Exponent of the penalty: 20 falling linearly to 2 after the warm-up of a fifth of the training, before it None.

    As BRECQ's code, which AdaRound's successors run.
    """
    if progress < _WARMUP:
        return None
    passed = min(1.0, (progress - _WARMUP) / (1 - _WARMUP))
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * passed


def rounding_penalty(fraction: Tensor, beta: float) -> Tensor:
    """sum(1 - abs(2 fraction - 1)^beta): zero where every fraction is 0 or 1 (AdaRound, eq. 24)."""
    return _Penalty.apply(fraction, beta)


class _Penalty(Function):
    @staticmethod
    def forward(ctx: Any, fraction: Tensor, beta: float) -> Tensor:
        centred = 2 * fraction - 1
        power = centred.abs().pow_(beta - 1).mul_(centred.sign())  # one power for both directions
        ctx.beta = beta
        ctx.save_for_backward(power)
        return fraction.numel() - (power * centred).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (power,) = ctx.saved_tensors
        return power * (-2 * ctx.beta * gradient), None


def interpolate(logits: Tensor, lower: Tensor, span: Tensor, scale: Tensor) -> Tensor:
    """scale * (lower + h(logits) * span), ``[n, groups, g]``, with gradients for logits and scale ``[n, groups]``."""
    return _Interpolate.apply(logits, lower, span, scale)


class _Interpolate(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, lower: Tensor, span: Tensor, scale: Tensor) -> Tensor:
        sigmoid = logits.sigmoid()
        ctx.save_for_backward(sigmoid, lower, span, scale)
        return _level(sigmoid, lower, span).mul_(scale.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sigmoid, lower, span, scale = ctx.saved_tensors
        to_scale = _level(sigmoid, lower, span).mul_(gradient).sum(-1) if ctx.needs_input_grad[3] else None
        to_logits = gradient * span * (scale.unsqueeze(-1) * (ZETA - GAMMA))
        to_logits = _where_within(to_logits, sigmoid, -GAMMA / (ZETA - GAMMA), (1 - GAMMA) / (ZETA - GAMMA))
        return _sigmoid_gradient(to_logits, sigmoid), None, None, to_scale


def _level(sigmoid: Tensor, lower: Tensor, span: Tensor) -> Tensor:
    return (sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0, 1).mul_(span).add_(lower)
