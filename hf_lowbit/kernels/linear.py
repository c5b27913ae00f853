"""The one entry to products with packed weights: called directly, recorded for gradients, or as an operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.kernels import ops
from hf_lowbit.kernels.autograd import PackedLinearFunction
from hf_lowbit.kernels.eager import is_eager
from hf_lowbit.kernels.known import known_products
from hf_lowbit.kernels.products import product, products


def packed_linear(
    x: Tensor,
    packed: PackedTensor,
    activation: ActivationSpec | None = None,
    backend: str | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """x ``[..., columns]`` float times a packed ``[rows, columns]``, giving ``[..., rows]``. Differentiable in x.

    Args:
        activation: quantize x first; without it activations stay as they are.
        backend: one of :data:`hf_lowbit.kernels.BACKENDS`, or None for the best.
        input_scale, input_shift: of static activations, float32 ``[groups]`` or ``[tokens, groups]``; None takes those
            of x, for calibration.
        sums: :func:`hf_lowbit.kernels.row_sums` of the weight, where codes have a shift; None computes them.
    """
    x = _cast_as_autocast(x)
    if not is_eager(x):
        return ops.packed_linear(x, packed, activation, backend, input_scale, input_shift, sums)
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = PackedLinearFunction.apply(x, packed, activation, backend, input_scale, input_shift, sums)
        return result
    if activation is None and (known := known_products(x, (packed,), backend)) is not None:  # by the shortest way
        return known(x)[0]
    return product(x, packed, activation, backend, input_scale, input_shift, sums)


def packed_linears(
    x: Tensor,
    weights: Sequence[PackedTensor],
    activation: ActivationSpec | None = None,
    backend: str | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    sums: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """As :func:`packed_linear` for several matrices at once, without gradients: one call for all, x read once."""
    return products(_cast_as_autocast(x), weights, activation, backend, input_scale, input_shift, sums)


def _cast_as_autocast(x: Tensor) -> Tensor:
    """Under autocast in its type, as torch's own linear layers compute."""
    if not torch._C._is_any_autocast_enabled():  # the answer of most calls, sooner
        return x
    if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
