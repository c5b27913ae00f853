"""Transforms: linear rewrites of what a packed layer reads, x' = T(x), and of what it returns, y = S(y').

They are applied each time the layer runs. Before rounding, the weight is rewritten so that the product stays the same;
the codes are those of the rewritten weight. A layer has a transform where the rewrite cannot be folded into its
neighbours. Input, output and weight keep their widths.

A kind of transform is a class of plain parameters, registered under a name: a plan names it, never an import path. Its
tensors are stored beside the codes as ``weight_transform_<part>``, integers or bit patterns, of shapes that follow from
the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hf_lowbit.formats import SpecError
from hf_lowbit.suggestion import unknown

Tensors = Mapping[str, Tensor]  # part -> tensor as stored
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class TransformSpec(ABC):
    """Parameters of a transform, and what they mean. Subclasses are frozen dataclasses of plain data.

    Attributes:
        kind: the name under which plans refer to the class.
    """

    kind: ClassVar[str]

    @abstractmethod
    def companions(self, rows: int, columns: int) -> Shapes:
        """Part -> (shape, dtype) of every stored tensor, for a layer of that many outputs and inputs.

        Raises:
            SpecError: parameters that do not fit such a layer.
        """

    @abstractmethod
    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        """x' of ``[..., columns]``, in x's type; differentiable in x."""

    def outputs(self, y: Tensor, tensors: Tensors) -> Tensor:
        """y of y' ``[..., rows]``, in its type, before the bias; differentiable. As it is, unless a kind says more."""
        return y

    @abstractmethod
    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        """The rewritten weight W' of ``[rows, columns]``, in at least float32; differentiable in the matrix."""

    @abstractmethod
    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        """The weight of an ordinary layer: ``outputs(inputs(x) @ matrix.T) == x @ folded(matrix).T``, in at least
        float32."""

    @abstractmethod
    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        """What is impossible about stored tensors of the right shapes; None if nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the kind and its parameters."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(values: Any) -> TransformSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for an unknown kind or other parameters than the kind's."""
        if not isinstance(values, dict):
            raise SpecError(f"a transform is an object with a kind, not {values!r}")
        parameters = dict(values)
        kind = parameters.pop("kind", None)
        if kind not in TRANSFORMS:
            raise SpecError(unknown("kind of transform", kind, TRANSFORMS, "registered"))
        try:
            return TRANSFORMS[kind](**parameters)
        except TypeError:
            raise SpecError(f"the transform {kind!r} has other parameters than {sorted(parameters)}") from None


TRANSFORMS: dict[str, type[TransformSpec]] = {}
_Kind = TypeVar("_Kind", bound=type[TransformSpec])


def register_transform(cls: _Kind) -> _Kind:
    """Add a kind of transform; a class decorator. Raises ValueError if its name is taken by another class."""
    if TRANSFORMS.setdefault(cls.kind, cls) is not cls:
        raise ValueError(f"transform {cls.kind!r} is already registered by {TRANSFORMS[cls.kind].__name__}")
    return cls
