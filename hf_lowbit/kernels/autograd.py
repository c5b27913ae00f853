"""Gradients of packed products: to the input only, the weight decoded again in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.kernels.products import input_gradient, product


class PackedLinearFunction(torch.autograd.Function):
    """No dense copy of the weight is kept between forward and backward.

    Rounding of activations is passed straight through (straight-through estimator). ``inputs`` are those of
    :func:`hf_lowbit.kernels.products.product`: scale and shift of stored inputs, sums of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: PackedTensor,
        activation: ActivationSpec | None,
        backend: str | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.packed, ctx.backend, ctx.others = packed, backend, len(inputs)
        return product(x, packed, activation, backend, *inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradient(gradients[0], ctx.packed, ctx.backend), None, None, None, *[None] * ctx.others


def convolve_decoded(
    x: Tensor, decoded: Callable[[slice], Tensor], parts: Sequence[slice], geometry: tuple[Any, Any, int]
) -> Tensor:
    """A convolution without padding, its kernel decoded part by part. Arguments: see :class:`DecodedConvolution`."""
    stride, dilation, groups = geometry
    convolve = F.conv1d if x.dim() == 3 else F.conv2d
    outputs = [convolve(x, decoded(own), None, stride, 0, dilation, groups) for own in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class DecodedConvolution(torch.autograd.Function):
    """A convolution whose kernel is decoded part by part, and again in backward; torch's own would keep all of it.

    Args of ``apply``:
        x: ``[batch, in_channels, *size]``, padded.
        decoded: a range of output channels -> their float kernels ``[n, in_channels / groups, *kernel]`` in x's type.
        parts: ranges that make up all output channels, in order; one of all where there are groups.
        geometry: stride, dilation and groups.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decoded: Callable[[slice], Tensor], parts: Sequence[slice], geometry: tuple[Any, Any, int]
    ) -> Tensor:
        ctx.decoded, ctx.parts, ctx.geometry, ctx.shape = decoded, parts, geometry, x.shape
        return convolve_decoded(x, decoded, parts, geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (stride, dilation, groups) = gradients, ctx.geometry
        transpose = conv1d_input if gradient.dim() == 3 else conv2d_input
        result = torch.zeros(ctx.shape, device=gradient.device)
        for own in ctx.parts:
            kernel = ctx.decoded(own).to(gradient.dtype)
            result += transpose(ctx.shape, kernel, gradient[:, own].contiguous(), stride, 0, dilation, groups)
        return result.to(gradient.dtype), None, None, None
