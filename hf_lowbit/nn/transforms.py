"""Input transforms: a linear rewrite x' = T(x) of what a packed layer reads, applied each time it runs.

Before rounding, the weight is rewritten so that the product stays the same; the codes are those of the rewritten
weight. A layer has a transform where the rewrite cannot be folded into the layer before it. Input and weight keep their
width.

A kind of transform is a class of plain parameters, registered under a name: a plan names it, never an import path. Its
tensors are stored beside the codes as ``weight_transform_<part>``, integers or bit patterns, of shapes that follow from
the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hf_lowbit.formats import SpecError

Tensors = Mapping[str, Tensor]  # part -> tensor as stored
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class TransformSpec(ABC):
    """Parameters of a transform, and what they mean. Subclasses are frozen dataclasses of plain data.

    Attributes:
        kind: the name under which plans refer to the class.
    """

    kind: ClassVar[str]

    @abstractmethod
    def companions(self, columns: int) -> Shapes:
        """Part -> (shape, dtype) of every stored tensor, for a layer of that many inputs.

        Raises:
            SpecError: parameters that do not fit such a layer.
        """

    @abstractmethod
    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        """x' of ``[..., columns]``, in x's type; differentiable in x."""

    @abstractmethod
    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        """The rewritten weight W' of ``[rows, columns]``, in at least float32; differentiable in the matrix."""

    @abstractmethod
    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        """The weight of an ordinary layer: ``inputs(x) @ matrix.T == x @ folded(matrix).T``, in at least float32."""

    @abstractmethod
    def problem(self, tensors: Tensors, columns: int) -> str | None:
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
            raise SpecError(f"unknown kind of transform {kind!r}; registered: {', '.join(TRANSFORMS)}")
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


@register_transform
@dataclass(frozen=True)
class Reassembly(TransformSpec):
    """Channels with outliers are split, as many similar ones merged (QLLM, arXiv 2310.08041, section 4.1).

    x' = x M with a sparse M: channel i is read T_i times, each time 1/T_i of it, and copies that share a target are
    averaged there. Column t of the rewritten weight is the sum of the columns of t's copies. Without merging that is
    exact; where channels are merged, they count as their mean.

    Stored are, for each copy, ``source`` and ``target`` (int32) and ``factor`` = 1 / (T_source * copies of target),
    the bit pattern of a float32.

    Attributes:
        entries: copies in all: the sum of T over the channels.
    """

    kind = "reassembly"

    entries: int

    def __post_init__(self) -> None:
        if type(self.entries) is not int or self.entries < 1:
            raise SpecError(f"reassembly: entries must be a positive integer, not {self.entries!r}")

    def companions(self, columns: int) -> Shapes:
        if self.entries < columns:
            raise SpecError(f"reassembly: {self.entries} entries cannot cover {columns} channels")
        return {part: ((self.entries,), torch.int32) for part in ("source", "target", "factor")}

    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        factor = tensors["factor"].view(torch.float32)
        return _gathered(x, tensors["source"], tensors["target"], factor).to(x.dtype)

    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return _gathered(matrix, tensors["source"], tensors["target"])

    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        factor = tensors["factor"].view(torch.float32)
        return _gathered(matrix, tensors["target"], tensors["source"], factor)

    def problem(self, tensors: Tensors, columns: int) -> str | None:
        for part in ("source", "target"):
            low, high = tensors[part].aminmax()
            if low < 0 or high >= columns:
                return f"{part} names channels outside of 0 .. {columns - 1}"
            if len(tensors[part].unique()) != columns:
                return f"{part} leaves channels out"
        copies, shared = (torch.bincount(tensors[part])[tensors[part]] for part in ("source", "target"))
        if not torch.allclose(tensors["factor"].view(torch.float32), 1.0 / (copies * shared), rtol=1e-6):
            return "factor is not what source and target make it"
        return None


def _gathered(values: Tensor, source: Tensor, target: Tensor, factor: Tensor | None = None) -> Tensor:
    """Sums over the last dimension: [..., target_e] += factor_e * [..., source_e], in at least float32."""
    wide = values.reshape(-1, values.shape[-1]).to(torch.promote_types(values.dtype, torch.float32))
    copies = wide.index_select(1, source)
    if factor is not None:
        copies = copies * factor.to(wide.dtype)
    return wide.new_zeros(wide.shape).index_add(1, target, copies).reshape(values.shape)
