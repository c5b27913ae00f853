"""A scale per input channel and a Hadamard transform after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowbit.nn.transforms.base import Shapes, Tensors, TransformSpec, register_transform
from hf_lowbit.nn.transforms.hadamard import Hadamard
from hf_lowbit.nn.transforms.scaling import Scaling

_SCALING = Scaling()


@register_transform
@dataclass(frozen=True)
class ScaledHadamard(TransformSpec):
    """x' = (x / s) (I kron H): :class:`Scaling`, whose tensor is stored, and then :class:`Hadamard`.

    Attributes:
        order: of H.
    """

    kind = "scaled_hadamard"

    order: int

    def __post_init__(self) -> None:
        Hadamard(self.order)  # raises for an order that cannot be

    def companions(self, rows: int, columns: int) -> Shapes:
        return _SCALING.companions(rows, columns) | Hadamard(self.order).companions(rows, columns)

    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        return Hadamard(self.order).inputs(_SCALING.inputs(x, tensors), {})

    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return Hadamard(self.order).weights(_SCALING.weights(matrix, tensors), {})

    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return _SCALING.folded(Hadamard(self.order).folded(matrix, {}), tensors)

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        return _SCALING.problem(tensors, rows, columns)
