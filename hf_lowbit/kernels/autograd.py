"""Gradients of packed products: to the input only, the weight decoded again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.kernels.products import input_gradient, product


class PackedLinearFunction(torch.autograd.Function):
    """No dense copy of the weight is kept between forward and backward.

    Rounding of activations is passed straight through (straight-through estimator).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: PackedTensor, activation: ActivationSpec | None, backend: str | None
    ) -> Tensor:
        ctx.packed, ctx.backend = packed, backend
        return product(x, packed, activation, backend)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return input_gradient(gradients[0], ctx.packed, ctx.backend), None, None, None
