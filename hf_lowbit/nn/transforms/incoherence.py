"""Incoherence processing (QuIP, arXiv 2307.13304): the codes are those of U W diag(d) V^T, which has no outliers left.

The layer computes y = U^T (W' V (x / d)). U and V are butterflies that a seed names: they are drawn when they are
first needed, shared by all layers of the same width, and never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.formats import SpecError
from hf_lowbit.formats.packed import from_bits
from hf_lowbit.nn.transforms.base import Shapes, Tensors, TransformSpec, register_transform
from hf_lowbit.transforms.butterfly import Butterfly, balanced_factors, draw_butterfly, rotate, rotate_back

SCALE_DTYPE = "bfloat16"  # of d
LARGEST_ROTATION = 1024
_INPUTS, _OUTPUTS = 0, 1  # a square layer's U and V are different


@register_transform
@dataclass(frozen=True)
class Incoherence(TransformSpec):
    """Inputs divided by d and rotated by V, outputs rotated back by U^T.

    Stored is ``scale``, d as bit patterns of bfloat16.

    Attributes:
        seed: from 0 to 2^32 - 1; it names U and V together with the layer's widths.
    """

    kind = "incoherence"

    seed: int

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise SpecError(f"incoherence: seed must be an integer from 0 to 2^32 - 1, not {self.seed!r}")

    def companions(self, rows: int, columns: int) -> Shapes:
        for what, width in (("outputs", rows), ("inputs", columns)):
            if balanced_factors(width)[1] > LARGEST_ROTATION:
                raise SpecError(
                    f"{width} {what} have no two factors up to {LARGEST_ROTATION}: rotating them would cost as much as "
                    "the layer"
                )
        return {"scale": ((columns,), torch.int16)}

    def inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        return _rotated(_wide(x) / _scale(tensors), self.seed, _INPUTS).to(x.dtype)

    def outputs(self, y: Tensor, tensors: Tensors) -> Tensor:
        return _rotated(_wide(y), self.seed, _OUTPUTS, back=True).to(y.dtype)

    def weights(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        mixed = _rotated(_wide(matrix) * _scale(tensors), self.seed, _INPUTS)
        return _rotated(mixed.t(), self.seed, _OUTPUTS).t()

    def folded(self, matrix: Tensor, tensors: Tensors) -> Tensor:
        mixed = _rotated(_wide(matrix).t(), self.seed, _OUTPUTS, back=True).t()
        return _rotated(mixed, self.seed, _INPUTS, back=True) / _scale(tensors)

    def problem(self, tensors: Tensors, rows: int, columns: int) -> str | None:
        scale = _scale(tensors)
        return None if bool(torch.isfinite(scale).all() and (scale > 0).all()) else "scale must be positive and finite"


def _scale(tensors: Tensors) -> Tensor:
    return from_bits(tensors["scale"], SCALE_DTYPE)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotated(x: Tensor, seed: int, side: int, back: bool = False) -> Tensor:
    """V x of rows in at least float32, or V^T x."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.hf_lowbit.butterfly(x, seed, side, back)
        return result
    with torch.autocast(x.device.type, enabled=False):  # half types would not be orthogonal any more
        return (rotate_back if back else rotate)(x, _butterfly(x.shape[-1], seed, side, x.device))


@lru_cache(maxsize=256)
def _butterfly(width: int, seed: int, side: int, device: torch.device) -> Butterfly:
    with torch.inference_mode(False):  # kept for calls that need gradients, too
        return draw_butterfly(width, seed, side).to(device)


# What torch.compile and torch.export see: nothing is drawn, and nothing of theirs is kept, while they trace.
_library = torch.library.Library("hf_lowbit", "FRAGMENT")
_library.define("butterfly(Tensor x, int seed, int side, bool back) -> Tensor")


@torch.library.impl(_library, "butterfly", "CompositeExplicitAutograd")
def _butterfly_op(x: Tensor, seed: int, side: int, back: bool) -> Tensor:
    return (rotate_back if back else rotate)(x, _butterfly(x.shape[-1], seed, side, x.device))


@torch.library.register_fake("hf_lowbit::butterfly", lib=_library)
def _butterfly_fake(x: Tensor, seed: int, side: int, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.rest = inputs


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    seed, side, back = ctx.rest
    return torch.ops.hf_lowbit.butterfly(gradient, seed, side, not back), None, None, None


torch.library.register_autograd("hf_lowbit::butterfly", _input_gradient, setup_context=_remember, lib=_library)
