"""Packed fully connected layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import KeptMatrix, kept_product
from hf_lowbit.nn.base import PackedModule, expect, frozen
from hf_lowbit.nn.constant_token import CONSTANT_INPUT, CONSTANT_OUTPUT, constant_companions, outputs_of_tokens
from hf_lowbit.nn.last_product import LastProduct, last_product
from hf_lowbit.nn.siblings import Siblings
from hf_lowbit.nn.spec import LayerSpec


class PackedLinear(PackedModule, nn.Linear):
    """nn.Linear with packed weights ``[out_features, in_features]``.

    It is an nn.Linear to isinstance, so that tools which look for linear layers (PEFT's "all-linear", LoRA loaders)
    find it.

    A transform encloses everything else: it comes before the input is quantized and before a low-rank branch, and after
    their sum; only the bias is outside. An exact part and the branch read the input as the transform leaves it. A
    constant first token goes past all of them.

    Attributes:
        siblings: the layers it computes together with, if any (see :mod:`hf_lowbit.nn.siblings`).
        kept: what graphs that are compiled from now on know its codes by, if they stay (see :func:`keep_matrices`); no
            more once they are moved or replaced.
    """

    kind = "linear"
    takes_transform = True
    takes_exact = True
    takes_constant_token = True
    siblings: Siblings | None = None
    kept: KeptMatrix | None = None
    _last: LastProduct | None = None

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.layer_spec = in_features, out_features, spec

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> PackedLinear:
        """From an nn.Linear."""
        linear = expect(module, nn.Linear)
        packed = cls(linear.in_features, linear.out_features, spec)
        packed.weight, packed.bias = linear.weight, linear.bias
        return packed

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """An nn.Linear with dequantized weights."""
        module = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        module.weight = nn.Parameter(self.dequantized(dtype=dtype))
        module.bias = self.bias
        return module

    def matrix_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """((out_features,), in_features)."""
        return (self.out_features,), self.in_features

    def companion_shapes(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """As of every packed module, and what is stored for a constant token."""
        return {**super().companion_shapes(name), **constant_companions(self, name)}

    def constant_token(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """The token and its product without the bias, ``[in]`` and ``[out]``: float32 as stored, int32."""
        return getattr(self, f"{name}{CONSTANT_INPUT}"), getattr(self, f"{name}{CONSTANT_OUTPUT}")

    @torch.no_grad()
    def set_constant_token(self, token: Tensor, product: Tensor, name: str = "weight") -> None:
        """Take token 0 of a sequence for a constant from now on.

        Args:
            token: ``[in]``, as the layer reads it.
            product: ``[out]``, what the float weight makes of it, without the bias.

        Raises:
            ValueError: other shapes, or values that are not finite.
        """
        given = {CONSTANT_INPUT: token, CONSTANT_OUTPUT: product}
        shapes = [tuple(tensor.shape) for tensor in given.values()]
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in given.values())
        if shapes != [(self.in_features,), (self.out_features,)] or not finite:
            raise ValueError(
                f"a constant token is [{self.in_features}] and its product [{self.out_features}], both finite, not "
                f"{shapes[0]} and {shapes[1]}{'' if finite else ' with NaN or infinite values'}"
            )
        self.layer_spec = replace(self.layer_spec, constant_token=True)
        device = getattr(self, name).device
        for suffix, tensor in given.items():
            setattr(self, f"{name}{suffix}", frozen(tensor.to(device, torch.float32).clone().view(torch.int32)))

    def set_packed(self, name: str, packed: PackedTensor) -> None:
        """As of every packed module; graphs that know the former codes refuse to run from then on."""
        self.kept = None
        super().set_packed(name, packed)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.kept = None
        return super()._apply(*args, **kwargs)

    def arranged(self, matrix: Tensor) -> Tensor:
        """``[out, in]`` as the float layer lays its weight out, and back: its own inverse."""
        return matrix

    def to_matrix(self, name: str, weight: Tensor) -> Tensor:
        """``[out, in]``, rewritten for the transform if there is one."""
        matrix, transform = self.arranged(weight), self.layer_spec.transform
        return matrix if transform is None else transform.weights(matrix, self.transform_tensors(name))

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """In the float layer's layout, a transform folded in."""
        transform = self.layer_spec.transform
        folded = matrix if transform is None else transform.folded(matrix, self.transform_tensors(name))
        return self.arranged(folded)

    def transformed(self, x: Tensor) -> Tensor:
        """The input ``[..., in_features]`` as the packed weight reads it, not quantized yet."""
        transform = self.layer_spec.transform
        return x if transform is None else transform.inputs(x, self.transform_tensors())

    def coded_product(self, x: Tensor) -> Tensor:
        """Of the codes with what they read of the transformed input."""
        if torch.compiler.is_compiling():
            if self.kept is not None and not (torch.is_grad_enabled() or torch.compiler.is_exporting()):
                return kept_product(x, self.kept, self.layer_spec.activation)
            return self.multiply(x, self.packed())
        known = None if self._last is None else self._last.of((self,), x)
        if known is not None:
            return known[0]
        y = self.multiply(x, self.packed())
        if (last := last_product((self,), x)) is not None:  # else setting it would take longer than asking
            self._last = last
        return y

    def _product(self, x: Tensor) -> Tensor:
        """Of codes and exact part with the transformed input."""
        exact = self.layer_spec.exact
        if exact is None:
            return self.coded_product(x)
        tensors = self.exact_tensors()
        y = self.coded_product(exact.coded_inputs(x, tensors))
        return y + exact.product(x, tensors, self.out_features)

    def unbiased(self, x: Tensor) -> Tensor:
        """The layer's output without its bias, of tokens that are none of them constant."""
        spec = self.layer_spec
        if spec.transform is not None:
            x = self.transformed(x)
        y = None if self.siblings is None else self.siblings.take(self, x)
        if y is None:
            y = self._product(x)
        factors = self.low_rank_factors("weight", x.dtype) if spec.low_rank else None
        if factors is not None:
            y = y + F.linear(F.linear(x, factors[0]), factors[1])
        if spec.transform is not None:
            y = spec.transform.outputs(y, self.transform_tensors())
        return y

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        y = outputs_of_tokens(self, x) if self.layer_spec.constant_token and x.dim() > 1 else self.unbiased(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedConv1D(PackedLinear):
    """transformers' Conv1D (GPT-2): a linear layer whose float weight is stored transposed, ``[in, out]``.

    Packed, it is ``[out, in]`` like any linear layer, so that codes lie along the input.
    """

    kind = "transformers_conv1d"
    nx: int
    nf: int

    @classmethod
    def from_float(cls, module: nn.Module, spec: LayerSpec) -> PackedConv1D:
        """From a transformers Conv1D: weight ``[nx, nf]``, bias ``[nf]``."""
        if type(module).__name__ != "Conv1D":
            raise TypeError(f"a {type(module).__name__} is not a transformers Conv1D")
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        in_features, out_features = weight.shape
        packed = cls(in_features, out_features, spec)
        packed.nx, packed.nf = in_features, out_features
        packed.weight, packed.bias = weight, bias
        return packed

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """A transformers Conv1D with dequantized weights."""
        from transformers.pytorch_utils import Conv1D

        module = Conv1D(self.nf, self.nx)
        module.weight, module.bias = nn.Parameter(self.dequantized(dtype=dtype)), self.bias
        return module

    def arranged(self, matrix: Tensor) -> Tensor:
        """``[out, in]`` to ``[in, out]``, and back."""
        return matrix.t()
