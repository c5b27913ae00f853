"""TunedScales: the scales of packed layers as something that a gradient can reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor
from hf_lowbit.formats.packed import scales, to_bits
from hf_lowbit.kernels import decode_matrix
from hf_lowbit.nn import PackedLinear
from hf_lowbit.plan import packed_modules
from hf_lowbit.training.straight_through import simulate_activation


class TunedScales(nn.Module):
    """log(scale / scale before) of every packed linear layer; codes, zero points and tables stay.

    Layers of other kinds, and those whose scales are codes themselves, keep their scales.

    Attributes:
        layers: name -> the layer whose scales are tuned.
        logs: of each, float32 of its scales' shape.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = {
            name: layer
            for name, layer in packed_modules(model).items()
            if isinstance(layer, PackedLinear) and layer.layer_spec.weight.scale_bits is None
        }
        self.logs = nn.ParameterList(torch.zeros_like(scales(layer.packed())) for layer in self.layers.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the layers multiply by their scales as they are now, rounded to their stored type."""
        try:
            for layer, log in zip(self.layers.values(), self.logs, strict=True):
                layer.coded_product = _Product(layer, log)  # type: ignore[method-assign]
            yield
        finally:
            for layer in self.layers.values():
                del layer.coded_product

    @torch.no_grad()
    def store(self) -> None:
        """Give the layers their scales as they are now."""
        for layer, log in zip(self.layers.values(), self.logs, strict=True):
            layer.set_packed("weight", _scaled(layer.packed(), log))


class _Product:
    """In the place of :meth:`PackedLinear.coded_product`."""

    def __init__(self, layer: PackedLinear, log: Tensor) -> None:
        self._layer, self._log = layer, log

    def __call__(self, x: Tensor) -> Tensor:
        activation = self._layer.layer_spec.activation
        if torch.is_autocast_enabled(x.device.type):  # it does not reach custom functions
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if activation is None:
            read = x
        else:
            scale, shift = self._layer.input_scales("weight", x.shape[:-1])
            read = simulate_activation(x, activation, input_scale=scale, input_shift=shift)
        product: Tensor = _TunedProduct.apply(read, self._log, self._layer.packed(), self._layer.backend)
        return product


class _TunedProduct(torch.autograd.Function):
    """x W^T, with gradients of x and of log(scale): of w = scale * (level - z) that is dL/dw * w, summed over a group.

    Rounding the scale to its stored type is the identity for gradients. No decoded weight is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: Tensor, packed: PackedTensor, backend: str | None) -> Tensor:
        ctx.packed, ctx.backend, ctx.shape = _scaled(packed, log), backend, log.shape
        ctx.save_for_backward(x)
        return x @ decode_matrix(ctx.packed, x.dtype, backend).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        weight = decode_matrix(ctx.packed, x.dtype, ctx.backend)
        flat = gradients[0].reshape(-1, weight.shape[0])
        by_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).float().mul_(weight)
        rows, groups = ctx.shape
        by_log = by_weight.reshape(len(weight), groups, -1).sum(-1)
        return gradients[0] @ weight, by_log if rows > 1 else by_log.sum(0, keepdim=True), None, None


def _scaled(packed: PackedTensor, log: Tensor) -> PackedTensor:
    return replace(packed, scale=to_bits(scales(packed) * log.exp(), packed.spec.scale_dtype))
