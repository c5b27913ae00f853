"""Convolutions of an image that is quantized before it is unfolded.

With stored scales a value has the same code in every patch that it is part of: each is quantized once, and patches of
codes are a quarter of the bytes of floats. What is padded is quantized with the rest, so that a zero is the code of
zero. Codes and products are those of patches that are unfolded first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels import Codes, convolution_of_codes, quantize_tokens

if TYPE_CHECKING:
    from hf_lowbit.nn.conv import _PackedConv


def reads_image(layer: _PackedConv, x: Tensor) -> bool:
    """Whether a layer can quantize its input first: no gradients, no branch that reads floats, its own product."""
    activation, taps = layer.layer_spec.activation, _size(layer.kernel_size)
    if activation is None or not activation.static or (activation.group_size or taps) % taps:
        return False
    if layer.groups != 1 or layer.layer_spec.low_rank or "multiply" in layer.__dict__:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    return layer.input_scale() is not None and not (x.requires_grad and torch.is_grad_enabled())


def convolve_codes(layer: _PackedConv, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The layer without its bias on a padded input ``[batch, channels, *extent]``: ``[batch, out, *size]``.

    A sample with NaN or infinity is NaN as a whole.
    """
    activation, batch = layer.layer_spec.activation, x.shape[0]
    assert activation is not None
    taps, positions = _size(layer.kernel_size), _size(size)
    stored = layer.input_scales("weight", (batch, *x.shape[2:]))
    image = quantize_tokens(x.movedim(1, -1).reshape(-1, x.shape[1]), _of_pixels(activation, taps), *stored)
    codes = image.codes.view(batch, *x.shape[2:], x.shape[1])
    scale, shift = (_of_samples(each, batch, positions) for each in (image.scale, image.shift))
    assert scale is not None
    patches = _patches(codes, layer.kernel_size, layer.stride, layer.dilation, size)
    y = convolution_of_codes(
        Codes(patches, scale, shift), layer.packed(), activation, layer.backend, x.dtype, layer.row_sums()
    )
    return y.unflatten(0, (batch, *size)).movedim(-1, 1)


def _of_samples(each_pixel: Tensor | None, batch: int, positions: int) -> Tensor | None:
    """Of each output position: those of a sample's pixels are the same, or NaN."""
    if each_pixel is None:
        return None
    return each_pixel.unflatten(0, (batch, -1)).amax(1).repeat_interleave(positions, 0)


def _patches(
    codes: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """A view of an image ``[batch, *extent, channels]`` as its patches ``[batch, *size, *kernel, channels]``."""
    steps = codes.stride()[1:-1]
    over = tuple(step * s for step, s in zip(steps, stride, strict=True))
    within = tuple(step * d for step, d in zip(steps, dilation, strict=True))
    shape = (codes.shape[0], *size, *kernel, codes.shape[-1])
    return codes.as_strided(shape, (codes.stride(0), *over, *within, codes.stride(-1)))


@lru_cache(maxsize=1024)
def _of_pixels(activation: ActivationSpec, taps: int) -> ActivationSpec:
    """Groups of a patch are groups of channels with all their taps."""
    group = activation.group_size
    return activation if group is None else replace(activation, group_size=group // taps)


def _size(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())
