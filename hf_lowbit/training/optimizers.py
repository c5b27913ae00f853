"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Adam, Optimizer

from hf_lowbit.suggestion import unknown

OPTIMIZERS = ("sign", "adam")


class SignDescent(Optimizer):
    """Steps of the learning rate along the sign of the gradient (SignRound, arXiv 2309.05516)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign_(), alpha=-group["lr"])


def make_optimizer(name: str, groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
    """An optimizer of :data:`OPTIMIZERS` over parameter groups, each with its own "lr_scale".

    Raises:
        ValueError: an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    return SignDescent(groups, learning_rate) if name == "sign" else Adam(groups, learning_rate)
