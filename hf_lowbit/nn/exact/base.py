"""Exact parts: some of a packed layer's weights in 16 bits, beside the codes of all the others.

They are multiplied by the input as it is, never by its quantized codes, and their product is added to that of the
codes. Both read the input after a transform, if the layer has one.

A kind of exact part is a class of plain parameters, registered under a name: a plan names it, never an import path. Its
tensors are stored beside the codes as ``weight_exact_<part>``, integers or bit patterns, of shapes that follow from the
parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hf_lowbit.formats import SpecError
from hf_lowbit.formats.packed import from_bits, to_bits
from hf_lowbit.suggestion import unknown

Tensors = Mapping[str, Tensor]  # part -> tensor as stored
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
TYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class ExactSpec(ABC):
    """Parameters of an exact part, and what they mean. Subclasses are frozen dataclasses of plain data.

    Attributes:
        kind: the name under which plans refer to the class.
        count: what is kept, in the kind's own unit.
        dtype: of the kept values: "float16", or "bfloat16" where those do not hold them.
    """

    kind: ClassVar[str]

    count: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise SpecError(f"exact {self.kind}: count must be a positive integer, not {self.count!r}")
        if self.dtype not in TYPES:
            raise SpecError(f"exact {self.kind}: dtype must be one of {', '.join(TYPES)}, not {self.dtype!r}")

    @abstractmethod
    def companions(self, rows: int, columns: int) -> Shapes:
        """Part -> (shape, dtype) of every stored tensor, for a layer of that many outputs and inputs.

        Raises:
            SpecError: parameters that do not fit such a layer.
        """

    @abstractmethod
    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        """What is impossible about stored tensors of the right shapes; None if nothing."""

    def coded_inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        """x ``[..., columns]`` as the codes read it, before it is quantized; differentiable. As it is, unless a kind
        says more."""
        return x

    @abstractmethod
    def product(self, x: Tensor, tensors: Tensors, rows: int) -> Tensor:
        """What the kept weights add for x ``[..., columns]``: ``[..., rows]`` in x's type; differentiable in x."""

    @abstractmethod
    def merged(self, decoded: Tensor, tensors: Tensors) -> Tensor:
        """The weight ``[rows, columns]`` that codes and kept values make together, in float32."""

    @abstractmethod
    def coded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        """What is left of ``[rows, columns]`` for codes: zero where weights are kept, so that no range is for them."""

    @abstractmethod
    def fitted(self, matrix: Tensor, decoded: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors whose kept weights, with these decoded codes, are those of ``matrix``; their places stay."""

    def values(self, tensors: Tensors) -> Tensor:
        """The kept values, float32."""
        return from_bits(tensors["values"], self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the kind and its parameters."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_dict(values: Any) -> ExactSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for an unknown kind or other parameters than the kind's."""
        if not isinstance(values, dict):
            raise SpecError(f"an exact part is an object with a kind, not {values!r}")
        parameters = dict(values)
        kind = parameters.pop("kind", None)
        if kind not in EXACT_KINDS:
            raise SpecError(unknown("kind of exact part", kind, EXACT_KINDS, "registered"))
        try:
            return EXACT_KINDS[kind](**parameters)
        except TypeError:
            raise SpecError(f"the exact part {kind!r} has other parameters than {sorted(parameters)}") from None


EXACT_KINDS: dict[str, type[ExactSpec]] = {}
_Kind = TypeVar("_Kind", bound=type[ExactSpec])


def register_exact(cls: _Kind) -> _Kind:
    """Add a kind of exact part; a class decorator. Raises ValueError if its name is taken by another class."""
    if EXACT_KINDS.setdefault(cls.kind, cls) is not cls:
        raise ValueError(f"exact part {cls.kind!r} is already registered by {EXACT_KINDS[cls.kind].__name__}")
    return cls


def type_for(values: Tensor) -> str:
    """The type to keep values in: float16, which rounds eight times finer, unless one of them is beyond its range."""
    return "float16" if bool(torch.isfinite(values.to(torch.float16)).all()) else "bfloat16"


def bits_of(values: Tensor, dtype: str) -> Tensor:
    """Values as they are stored, the int16 bit pattern of ``dtype``. Raises ValueError for what it cannot hold."""
    bits = to_bits(values, dtype)
    if not bool(torch.isfinite(from_bits(bits, dtype)).all()):
        raise ValueError(f"weights that are kept exact are NaN, infinite or too large for {dtype}")
    return bits
