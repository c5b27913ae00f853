"""A scale per input channel that nothing before the layer can take in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.formats.packed import from_bits, to_bits
from hf_lowbit.nn.transforms.base import Shapes, Tensors, TransformSpec, register_transform

_DTYPE = "bfloat16"


@register_transform
@dataclass(frozen=True)
class Scaling(TransformSpec):
    """x' = x / s, W' = W diag(s): SmoothQuant's and SVDQuant's smoothing (arXiv 2211.10438, 2411.05007) at run time.

    Stored is ``scale`` ``[columns]``, positive, bfloat16 bit patterns.
    """

    kind = "scaling"

    @staticmethod
    def stored(scale: Tensor) -> dict[str, Tensor]:
        """The tensors of a transform by ``scale`` ``[columns]``, positive floats."""
        return {"scale": to_bits(scale, _DTYPE)}

    def companions(self, rows: int, columns: int) -> Shapes:
        return {"scale": ((columns,), torch.int16)}

    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        return (_wide(x) / _scale(tensors)).to(x.dtype)

    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return _wide(matrix) * _scale(tensors)

    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        return _wide(matrix) / _scale(tensors)

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        scale = _scale(tensors)
        return None if bool((torch.isfinite(scale) & (scale > 0)).all()) else "scale holds values that are not positive"


def _scale(tensors: Tensors) -> Tensor:
    return from_bits(tensors["scale"], _DTYPE)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
