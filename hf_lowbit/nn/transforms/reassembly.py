"""Channel reassembly: channels with outliers are split, similar ones merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.formats import SpecError
from hf_lowbit.nn.transforms.base import Shapes, Tensors, TransformSpec, register_transform


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

    def companions(self, rows: int, columns: int) -> Shapes:
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

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
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
