"""Packed fully connected layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowbit.nn.base import PackedModule, expect
from hf_lowbit.nn.siblings import Siblings
from hf_lowbit.nn.spec import LayerSpec


class PackedLinear(PackedModule, nn.Linear):
    """nn.Linear with packed weights ``[out_features, in_features]``.

    It is an nn.Linear to isinstance, so that tools which look for linear layers (PEFT's "all-linear", LoRA loaders)
    find it.

    A transform encloses everything else: it comes before the input is quantized and before a low-rank branch, and after
    their sum; only the bias is outside. An exact part and the branch read the input as the transform leaves it.

    Attributes:
        siblings: the layers it computes together with, if any (see :mod:`hf_lowbit.nn.siblings`).
    """

    kind = "linear"
    takes_transform = True
    takes_exact = True
    siblings: Siblings | None = None

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
        return self.multiply(x, self.packed())

    def _product(self, x: Tensor) -> Tensor:
        """Of codes and exact part with the transformed input."""
        exact = self.layer_spec.exact
        if exact is None:
            return self.coded_product(x)
        tensors = self.exact_tensors()
        y = self.coded_product(exact.coded_inputs(x, tensors))
        return y + exact.product(x, tensors, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if self.layer_spec.transform is not None:
            x = self.transformed(x)
        y = None if self.siblings is None else self.siblings.take(self, x)
        if y is None:
            y = self._product(x)
        factors = self.low_rank_factors("weight", x.dtype)
        if factors is not None:
            y = y + F.linear(F.linear(x, factors[0]), factors[1])
        if self.layer_spec.transform is not None:
            y = self.layer_spec.transform.outputs(y, self.transform_tensors())
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
