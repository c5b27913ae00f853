"""Packed convolutions, one- and two-dimensional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.kernels import NATIVE_TOKENS, decode_matrix
from hf_lowbit.kernels.autograd import DecodedConvolution, convolve_decoded
from hf_lowbit.nn.base import PackedModule, expect
from hf_lowbit.nn.quantized_image import convolve_codes, reads_image
from hf_lowbit.nn.spec import LayerSpec

# Output channels are decoded in parts of this size: larger buffers are mapped anew at every call, which takes longer
# than decoding into them.
_DECODED_BYTES = 8 << 20


class _PackedConv(PackedModule):
    """A convolution as a matrix ``[out_channels, in_channels / groups * kernel]``.

    With full-precision activations and many output positions the kernel is decoded and torch convolves; with few, or
    quantized activations, the input is unfolded and every patch is a token of its own. Inputs with stored scales are
    quantized before (:mod:`hf_lowbit.nn.quantized_image`).
    """

    float_class: Any  # nn.Conv1d or nn.Conv2d: their constructors differ from their common base's
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def __init__(self, module: nn.modules.conv._ConvNd, spec: LayerSpec) -> None:
        nn.Module.__init__(self)
        self.layer_spec = spec
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(module, name))
        self.padding_mode = module.padding_mode
        self.transposed, self.output_padding = module.transposed, module.output_padding
        self._reversed_padding_repeated_twice = module._reversed_padding_repeated_twice
        self.weight, self.bias = module.weight, module.bias

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> _PackedConv:
        """From an nn.Conv1d or nn.Conv2d."""
        return cls(expect(module, cls.float_class), spec)

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """The torch convolution with dequantized weights."""
        shape = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        module: nn.Module = self.float_class(
            *shape, self.groups, self.bias is not None, padding_mode=self.padding_mode, device="meta"
        )
        module.register_parameter("weight", nn.Parameter(self.dequantized(dtype=dtype)))
        if self.bias is not None:
            module.register_parameter("bias", self.get_parameter("bias"))
        return module

    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((out_channels,), in_channels / groups * kernel size)."""
        return (self.out_channels,), self.in_channels // self.groups * _product(self.kernel_size)

    def to_matrix(self, name: str, weight: Tensor) -> Tensor:
        """``[out, in / groups, *kernel]`` to ``[out, in / groups * kernel]``."""
        return weight.flatten(1)

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`to_matrix`."""
        return matrix.unflatten(1, (self.in_channels // self.groups, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_channels, *size]``, or without a batch, to ``[batch, out_channels, *output size]``."""
        batched = x if x.dim() == len(self.kernel_size) + 2 else x.unsqueeze(0)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(batched, self._reversed_padding_repeated_twice, mode=mode)
        size = self._output_size(padded)
        positions = padded.shape[0] * _product(size)
        few = self.groups == 1 and positions <= NATIVE_TOKENS
        is_full_precision = self.layer_spec.activation is None
        y = self._convolve_decoded(padded) if is_full_precision and not few else self._convolve_patches(padded, size)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).reshape(-1, *[1] * len(self.kernel_size))
        return y if x is batched else y.squeeze(0)

    def _convolve_decoded(self, x: Tensor) -> Tensor:
        columns = self.in_channels // self.groups * _product(self.kernel_size)
        step = self.out_channels if self.groups > 1 else max(16, _DECODED_BYTES // (columns * x.dtype.itemsize))
        starts = range(0, self.out_channels, step)
        parts = [slice(first, min(first + step, self.out_channels)) for first in starts]
        geometry = self.stride, self.dilation, self.groups
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            result: Tensor = DecodedConvolution.apply(x, self._decoded(x.dtype), parts, geometry)
            return result
        return convolve_decoded(x, self._decoded(x.dtype), parts, geometry)

    def _decoded(self, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        """Output channels -> their kernels, the branch added."""
        packed, factors = self.packed(), self.low_rank_factors("weight", dtype)

        def decoded(own: slice) -> Tensor:
            matrix = decode_matrix(packed.rows(own), dtype, self.backend)
            matrix = matrix if factors is None else matrix + factors[1][own] @ factors[0]
            return self.from_matrix("weight", matrix)

        return decoded

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        geometry = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple((extent - d * (k - 1) - 1) // s + 1 for extent, k, s, d in geometry)

    def _convolve_patches(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        if reads_image(self, x):
            return convolve_codes(self, x, size)
        flat = len(self.kernel_size) == 1
        kernel, stride, dilation = (((1, *v) if flat else v) for v in (self.kernel_size, self.stride, self.dilation))
        image = x.unsqueeze(-2) if flat else x
        patches = F.unfold(image, kernel, dilation, 0, stride).transpose(1, 2)  # [batch, positions, in * kernel]
        rows = self.out_channels // self.groups
        factors = self.low_rank_factors("weight", x.dtype)
        outputs = []
        for group, tokens in enumerate(patches.chunk(self.groups, -1)):
            own = slice(group * rows, (group + 1) * rows)
            y = self.multiply(tokens, self.packed().rows(own))
            if factors is not None:
                y = y + F.linear(F.linear(tokens, factors[0]), factors[1][own])
            outputs.append(y)
        y = torch.cat(outputs, -1).transpose(1, 2)
        return y if flat else y.unflatten(-1, size)


class PackedConv1d(_PackedConv, nn.Conv1d):
    """nn.Conv1d with packed weights."""

    kind = "conv1d"
    float_class = nn.Conv1d


class PackedConv2d(_PackedConv, nn.Conv2d):
    """nn.Conv2d with packed weights."""

    kind = "conv2d"
    float_class = nn.Conv2d


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())
