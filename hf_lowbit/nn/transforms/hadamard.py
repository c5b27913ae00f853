"""A Hadamard transform of a layer's input: outliers of single channels are spread over all of a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowbit.formats import SpecError
from hf_lowbit.nn.transforms.base import Shapes, Tensors, TransformSpec, register_transform
from hf_lowbit.transforms.hadamard import hadamard, hadamard_base


@register_transform
@dataclass(frozen=True)
class Hadamard(TransformSpec):
    """x' = x (I kron H kron I_inner) (QuaRot, arXiv 2404.00456, stage 1b); computed in float32, nothing is stored.

    Attributes:
        order: of H.
        inner: channels between two that are mixed: 1, or the channels of a head where heads are mixed.
    """

    kind = "hadamard"

    order: int
    inner: int = 1

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order < 2 or hadamard_base(self.order) is None:
            raise SpecError(f"hadamard: no Hadamard matrix of order {self.order!r} can be constructed")
        if type(self.inner) is not int or self.inner < 1:
            raise SpecError(f"hadamard: inner must be a positive integer, not {self.inner!r}")

    def companions(self, rows: int, columns: int) -> Shapes:
        if columns % (self.order * self.inner):
            raise SpecError(f"hadamard: blocks of {self.order} x {self.inner} channels do not divide {columns}")
        return {}

    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        return hadamard(x, self.order, self.inner).to(x.dtype)

    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return hadamard(matrix, self.order, self.inner)

    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return hadamard(matrix, self.order, self.inner, inverse=True)

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        return None
