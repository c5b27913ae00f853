"""Sums of a packed weight, remembered as long as it stays what it is."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import row_sums
from hf_lowbit.nn.graphs import outside_graphs
from hf_lowbit.nn.remembered import Remembered


class RowSums(Remembered[Tensor]):
    """:func:`hf_lowbit.kernels.row_sums` of the parameters of one module."""

    @outside_graphs
    def of_packed(self, name: str, packed: PackedTensor, groups: int) -> Tensor:
        """float32 ``[..., rows, groups]``."""
        return self.of((name, groups), packed.tensors().values(), lambda: row_sums(packed, groups))
