"""Single weights in 16 bits, anywhere in the matrix: a sparse matrix that is added to the decoded one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.nn.exact.base import ExactSpec, Shapes, Tensors, bits_of, register_exact, type_for

_INT16_COLUMNS = 1 << 15


@register_exact
@dataclass(frozen=True)
class ExactSparse(ExactSpec):
    """``count`` single weights as a sparse matrix (SpQR, arXiv 2306.03078).

    W = decode(codes) + S: a kept value is the weight minus what its code decodes to, so that the product of the codes
    needs no mask. S is stored by rows: ``pointers`` (int32 ``[rows + 1]``, where each row starts), ``columns`` (int16,
    int32 for more than 32768 inputs) and ``values`` (16-bit pattern), both ``[count]``.
    """

    kind = "sparse"

    def companions(self, rows: int, columns: int) -> Shapes:
        return {
            "pointers": ((rows + 1,), torch.int32),
            "columns": ((self.count,), _column_type(columns)),
            "values": ((self.count,), torch.int16),
        }

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        pointers, places = tensors["pointers"], tensors["columns"]
        if int(pointers[0]) != 0 or int(pointers[-1]) != self.count or bool((pointers.diff() < 0).any()):
            return f"pointers do not divide {self.count} weights among {rows} rows"
        if int(places.min()) < 0 or int(places.max()) >= columns:
            return f"columns lie outside of 0 .. {columns - 1}"
        return None if bool(torch.isfinite(self.values(tensors)).all()) else "values holds NaN or infinite values"

    def product(self, x: Tensor, tensors: Tensors, rows: int) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        # A row's sum over its weights is a bag of x's channels: differentiable and traceable, unlike torch's sparse
        # matrices. 4096 x 4096 with 1 %, float32, one core: 0.7 ms for 1 token, 0.5 for 16, 2.3 for 128 (a CSR product
        # 0.2, 0.5 and 3.8); bfloat16 with many tokens several times faster than that.
        y = F.embedding_bag(
            tensors["columns"].to(torch.int32),
            tokens.t().contiguous(),
            tensors["pointers"],
            mode="sum",
            per_sample_weights=self.values(tensors).to(x.dtype),
            include_last_offset=True,
        )
        return y.t().reshape(*x.shape[:-1], rows)

    def merged(self, decoded: Tensor, tensors: Tensors) -> Tensor:
        return decoded.float().index_put(_places(tensors), self.values(tensors), accumulate=True)

    def coded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return matrix.index_put(_places(tensors), matrix.new_zeros(()))

    def fitted(self, matrix: Tensor, decoded: Tensor, tensors: Tensors) -> dict[str, Tensor]:
        places = _places(tensors)
        difference = matrix.float()[places] - decoded.float()[places]
        return {**tensors, "values": bits_of(difference, self.dtype)}


def keep_weights(matrix: Tensor, decoded: Tensor, mask: Tensor) -> tuple[ExactSparse, dict[str, Tensor]]:
    """Some weights of ``[rows, columns]``, for :meth:`PackedModule.set_exact`.

    Args:
        matrix: the weights to be.
        decoded: what all codes decode to, those of the kept weights included.
        mask: bool, which are kept, at least one.

    Raises:
        ValueError: differences that no 16-bit type holds.
    """
    difference = (matrix.float() - decoded.float())[mask]
    spec = ExactSparse(len(difference), type_for(difference))
    pointers = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    columns = mask.nonzero()[:, 1].to(_column_type(mask.shape[1]))
    return spec, {"pointers": pointers, "columns": columns, "values": bits_of(difference, spec.dtype)}


def _column_type(columns: int) -> torch.dtype:
    return torch.int16 if columns <= _INT16_COLUMNS else torch.int32


def _places(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Row and column of every kept weight."""
    pointers = tensors["pointers"]
    rows = torch.arange(len(pointers) - 1, device=pointers.device).repeat_interleave(pointers.diff())
    return rows, tensors["columns"].long()
