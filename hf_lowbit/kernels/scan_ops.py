"""Convolution and scan as torch custom operators: what torch.compile and torch.export see instead of their insides.

Operators take no tuples of tensors, and return nothing that may be missing or is one of their arguments: operands are
spread out, and empty tensors stand for what is missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowbit.kernels import scanning
from hf_lowbit.kernels.operand import Convolution, Operand, Recurrence

_library = torch.library.Library("hf_lowbit", "FRAGMENT")
_library.define(
    "causal_convolution(Tensor x, Tensor? x_scale, Tensor weight, Tensor? bias, Tensor(a!)? state, bool silu, "
    "Tensor? out_scale, bool update, ScalarType dtype, str? backend) -> Tensor"
)
_library.define(
    "selective_scan(Tensor x, Tensor? x_scale, Tensor dt, Tensor? dt_scale, Tensor A, Tensor B, Tensor? B_scale, "
    "Tensor C, Tensor? C_scale, Tensor? D, Tensor? z, Tensor? z_scale, Tensor? dt_bias, float[] dt_limit, "
    "Tensor(a!)? state, Tensor? state_scale, Tensor? state_cluster, bool return_state, bool update, int? peaks_every, "
    "ScalarType dtype, str? backend) -> (Tensor, Tensor, Tensor)"
)


def convolution(given: Convolution, *rest: Any) -> Tensor:
    """:func:`hf_lowbit.kernels.scanning.convolution` as an operator."""
    x, weight, bias, state, *others = given
    kept = x.values.new_empty(0) if state is None else state  # inductor fails where what may be written is None
    result: Tensor = torch.ops.hf_lowbit.causal_convolution(*x, weight, bias, kept, *others, *rest)
    return result


def selective_scan(
    given: Recurrence, return_state: bool, update: bool, *rest: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`hf_lowbit.kernels.scanning.selective_scan` as an operator."""
    x, dt, A, B, C, D, z, dt_bias, dt_limit, state, *scales = given
    gate = (None, None) if z is None else z
    y, after, peaks = torch.ops.hf_lowbit.selective_scan(
        *x, *dt, A, *B, *C, D, *gate, dt_bias, list(dt_limit), state, *scales, return_state, update, *rest
    )
    return y, state if update else after if return_state else None, None if rest[0] is None else peaks


@torch.library.impl(_library, "causal_convolution", "CompositeExplicitAutograd")
def _convolution(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    out_scale: Tensor | None,
    *rest: Any,
) -> Tensor:
    kept = None if state is None or state.dim() == 1 else state
    return scanning.convolution(Convolution(Operand(x, x_scale), weight, bias, kept, silu, out_scale), *rest)


@torch.library.impl(_library, "selective_scan", "CompositeExplicitAutograd")
def _selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, x_scale, dt, dt_scale, A, B, B_scale, C, C_scale, D, z, z_scale, dt_bias, dt_limit, *rest = arguments
    operands = Operand(x, x_scale), Operand(dt, dt_scale), A, Operand(B, B_scale), Operand(C, C_scale)
    gate = None if z is None else Operand(z, z_scale)
    given = Recurrence(*operands, D, gate, dt_bias, tuple(dt_limit), *rest[:3])
    y, after, peaks = scanning.selective_scan(given, *rest[3:])
    is_updated, missing = rest[4], y.new_empty(0)
    return y, missing if is_updated or after is None else after, missing.clone() if peaks is None else peaks


@torch.library.register_fake("hf_lowbit::causal_convolution", lib=_library)
def _convolution_fake(x: Tensor, *arguments: Any) -> Tensor:
    out_scale, dtype = arguments[5], arguments[7]
    return x.new_empty(x.shape, dtype=dtype if out_scale is None else torch.int8)


@torch.library.register_fake("hf_lowbit::selective_scan", lib=_library)
def _selective_scan_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, state_scale, _cluster, return_state, update, peaks_every, dtype, _backend = arguments
    (batch, tokens, channels), n = x.shape, arguments[4].shape[3]
    y = x.new_empty(x.shape, dtype=dtype)
    after, peaks = y.new_empty(0), y.new_empty(0)
    if return_state and not update:
        coded = torch.float32 if state_scale is None else torch.int8
        after = x.new_empty(batch, channels, n, dtype=coded)
    if peaks_every is not None:
        peaks = x.new_empty(batch, -(-tokens // peaks_every), channels, n, dtype=torch.float32)
    return y, after, peaks
