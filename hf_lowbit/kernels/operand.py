"""What a scan or a convolution reads: floats, floats on a stored grid of int8 values, or the codes themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operand(NamedTuple):
    """An input, quantized or not.

    Attributes:
        values: float or int8 ``[..., channels]``.
        scale: float32, broadcast over the last dimensions of ``values``: ``[1]``, ``[channels]``, ``[groups, 1]``.
            With int8 values: what one code is worth. With floats: they are rounded to that grid before use. None:
            floats as they are.
    """

    values: Tensor
    scale: Tensor | None = None


class Recurrence(NamedTuple):
    """All that a scan reads, by the names of :func:`hf_lowbit.kernels.selective_scan`."""

    x: Operand
    dt: Operand
    A: Tensor
    B: Operand
    C: Operand
    D: Tensor | None
    z: Operand | None
    dt_bias: Tensor | None
    dt_limit: tuple[float, float]
    state: Tensor | None
    state_scale: Tensor | None
    state_cluster: Tensor | None


class Convolution(NamedTuple):
    """All that a convolution reads, and what becomes of its result, by the names of
    :func:`hf_lowbit.kernels.causal_convolution`.
    """

    x: Operand
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    silu: bool
    out_scale: Tensor | None


class Laid(NamedTuple):
    """An operand as the kernels of every device read it.

    Attributes:
        data: the channels of a token lie one after the other.
        scale: float32, contiguous, or None; so many (``run``) channels in a row share one.
        batch_stride, token_stride: in elements.
    """

    data: Tensor
    scale: Tensor | None
    batch_stride: int
    token_stride: int
    run: int


def laid_out(operand: Operand) -> Laid:
    """An operand ``[batch, T, ...]`` as it lies; copied where its channels lie apart."""
    values, scale = operand
    if not values.is_contiguous() and not _lies_side_by_side(values):
        values = values.contiguous()
    batch_stride, token_stride = values.stride()[:2]
    if scale is None:
        return Laid(values, None, batch_stride, token_stride, 1)
    channels = values.shape[2:]
    run = channels.numel()
    if scale.numel() > 1:
        per_channel = scale.numel() == run
        if not per_channel and not (len(channels) == 2 and scale.shape == (channels[0], 1)):
            scale = scale.expand(channels)
        run //= scale.numel()
    return Laid(values, plain_floats(scale), batch_stride, token_stride, run)


def _lies_side_by_side(values: Tensor) -> bool:
    """Whether the channels ``[...]`` of a token ``[batch, T, ...]`` lie one after the other."""
    expected = 1
    for size, stride in zip(reversed(values.shape[2:]), reversed(values.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def plain_floats(tensor: Tensor) -> Tensor:
    """The same in float32, contiguous."""
    return tensor if tensor.dtype == torch.float32 and tensor.is_contiguous() else tensor.float().contiguous()


def quantize_codes(values: Tensor, scale: Tensor) -> Tensor:
    """int8 codes -127..127 of ``values`` times ``1 / scale``, half to even; NaN, which has no code, becomes 0.

    The one definition of this rounding: the native kernels multiply by the same float32 reciprocal. What is on the grid
    already keeps its code, as it does where others divide.
    """
    return (
        (values.detach().float() * scale.float().reciprocal())
        .round_()
        .nan_to_num_(0.0)
        .clamp_(-127, 127)
        .to(torch.int8)
    )


def restore_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 values of codes."""
    return codes.float() * scale


def float_values(operand: Operand) -> Tensor:
    """The values that count, in float32 (float64 stays); gradients pass the rounding as if it were not there."""
    values, scale = operand
    if not values.is_floating_point():
        if scale is None:
            raise ValueError("int8 values have no meaning without a scale")
        return restore_codes(values, scale)
    wide = values if values.dtype == torch.float64 else values.float()
    if scale is None:
        return wide
    rounded = restore_codes(quantize_codes(values, scale), scale).to(wide.dtype)
    return rounded + (wide - wide.detach()) if values.requires_grad and torch.is_grad_enabled() else rounded


def codes_of(operand: Operand) -> Tensor:
    """The int8 codes of an operand that has a scale."""
    values, scale = operand
    if scale is None:
        raise ValueError("codes of an input without a scale")
    return quantize_codes(values, scale) if values.is_floating_point() else values
