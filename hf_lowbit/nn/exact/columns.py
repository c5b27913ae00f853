"""Whole input columns in 16 bits: what outlier features of the input are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.formats import SpecError
from hf_lowbit.nn.exact.base import ExactSpec, Shapes, Tensors, bits_of, register_exact, type_for


@register_exact
@dataclass(frozen=True)
class ExactColumns(ExactSpec):
    """``count`` input columns as floats (QUIK, arXiv 2310.09259).

    The codes' input is zero in those columns: they do not enter a token's scale, and what their codes say does not
    matter. Stored are ``index`` (int32 ``[count]``, ascending) and ``values`` (16-bit pattern ``[rows, count]``).
    """

    kind = "columns"

    def companions(self, rows: int, columns: int) -> Shapes:
        if self.count > columns:
            raise SpecError(f"exact columns: a layer of {columns} inputs does not have {self.count} columns")
        return {"index": ((self.count,), torch.int32), "values": ((rows, self.count), torch.int16)}

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        index = tensors["index"]
        if int(index[0]) < 0 or int(index[-1]) >= columns or not bool((index.diff() > 0).all()):
            return f"index is not an ascending choice of 0 .. {columns - 1}"
        return None if bool(torch.isfinite(self.values(tensors)).all()) else "values holds NaN or infinite values"

    def coded_inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x.index_fill(-1, tensors["index"].long(), 0)

    def product(self, x: Tensor, tensors: Tensors, rows: int) -> Tensor:
        return F.linear(x.index_select(-1, tensors["index"]), self.values(tensors).to(x.dtype))

    def merged(self, decoded: Tensor, tensors: Tensors) -> Tensor:
        return decoded.float().index_copy(1, tensors["index"].long(), self.values(tensors))

    def coded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return matrix.index_fill(1, tensors["index"].long(), 0)

    def fitted(self, matrix: Tensor, decoded: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        kept = matrix.float().index_select(1, tensors["index"])
        return {**tensors, "values": bits_of(kept, self.dtype)}


def keep_columns(matrix: Tensor, index: Tensor) -> tuple[ExactColumns, dict[str, Tensor]]:
    """Some columns of ``[rows, columns]``, as they are, for :meth:`PackedModule.set_exact`.

    Args:
        index: which, at least one, in any order.

    Raises:
        ValueError: values that no 16-bit type holds.
    """
    index = index.sort().values
    kept = matrix.float().index_select(1, index)
    spec = ExactColumns(len(index), type_for(kept))
    return spec, {"index": index.to(torch.int32), "values": bits_of(kept, spec.dtype)}
