"""The native scan and convolution of state-space mixers, on tensors.

A decode step is a few microseconds of work, so the arguments of lowbit.h are packed as one run of eight-byte fields:
setting as many of a ctypes structure would take longer than the step.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hf_lowbit.kernels.cpu.products import VALUE_TYPES, _check, _library
from hf_lowbit.kernels.operand import Convolution, Operand, Recurrence, laid_out, plain_floats

_SCAN = struct.Struct("@51q2dq")
_CONVOLUTION = struct.Struct("@20q")
_ABSENT = (0, 0, 0, 0, 0, 0)


def selective_scan(
    given: Recurrence,
    new_state: Tensor | None,
    peaks_every: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """:func:`hf_lowbit.kernels.selective_scan`: the output and the peaks; the last state goes into ``new_state``.

    The state before and ``new_state`` are contiguous, float32 or int8, and may be the same.
    """
    x, dt, A, B, C, D, z, dt_bias, dt_limit, state, state_scale, state_cluster = given
    batch, tokens, channels = x.values.shape
    _, _, groups, n = B.values.shape
    heads = A.shape[0]
    y = torch.empty(batch, tokens, channels, dtype=dtype)
    peaks = None
    if peaks_every is not None:
        peaks = torch.empty((batch, -(-tokens // peaks_every), channels, n))
    kept: list[object] = []  # copies, alive until the call returns
    if state_cluster is not None and not (state_cluster.dtype == torch.int32 and state_cluster.is_contiguous()):
        state_cluster = state_cluster.to(torch.int32).contiguous()
    arguments = _SCAN.pack(
        *_operand(x, kept),
        *_operand(dt, kept),
        *_operand(B, kept),
        *_operand(C, kept),
        *(_ABSENT if z is None else _operand(z, kept)),
        _floats(A, kept),
        _floats(D, kept),
        _floats(dt_bias, kept),
        0 if state is None else state.data_ptr(),
        0 if new_state is None else new_state.data_ptr(),
        _floats(state_scale, kept),
        0 if state_cluster is None else state_cluster.data_ptr(),
        y.data_ptr(),
        0 if peaks is None else peaks.data_ptr(),
        batch,
        tokens,
        channels,
        heads,
        channels // heads,
        groups,
        n,
        1 if A.dim() == 1 else n,
        0 if state_scale is None else state_scale.shape[1],
        peaks_every or 0,
        0 if state is None else VALUE_TYPES[state.dtype],
        VALUE_TYPES[dtype],
        *dt_limit,
        0 if state_scale is None else state_scale.shape[0],
    )
    if y.numel():
        _check(_library().hfl_selective_scan(arguments, torch.get_num_threads()))
    return y, peaks


def causal_convolution(given: Convolution, update: bool, dtype: torch.dtype) -> Tensor:
    """:func:`hf_lowbit.kernels.causal_convolution`; ``state`` is contiguous, and changed in place with ``update``."""
    x, weight, bias, state, silu, out_scale = given
    batch, tokens, channels = x.values.shape
    y = torch.empty(batch, tokens, channels, dtype=dtype if out_scale is None else torch.int8)
    kept: list[object] = []
    address = 0 if state is None else state.data_ptr()
    arguments = _CONVOLUTION.pack(
        *_operand(x, kept),
        _floats(weight, kept),
        _floats(bias, kept),
        _floats(out_scale, kept),
        address,
        address if update else 0,
        y.data_ptr(),
        batch,
        tokens,
        channels,
        weight.shape[1],
        1 if out_scale is None else channels // out_scale.numel(),
        0 if state is None else VALUE_TYPES[state.dtype],
        3 if out_scale is not None else VALUE_TYPES[dtype],
        silu,
    )
    if y.numel():
        _check(_library().hfl_causal_convolution(arguments, torch.get_num_threads()))
    return y


def _operand(operand: Operand, kept: list[object]) -> tuple[int, int, int, int, int, int]:
    """``hfl_operand`` of lowbit.h: values, scale, their strides, how many channels in a row share a scale, type."""
    laid = laid_out(operand)
    kept.append(laid)
    data, scale, batch_stride, token_stride, run = laid
    address = 0 if scale is None else scale.data_ptr()
    return data.data_ptr(), address, batch_stride, token_stride, run, VALUE_TYPES[data.dtype]


def _floats(tensor: Tensor | None, kept: list[object]) -> int:
    """Where the float32 values of a tensor lie, one after the other; 0 without one."""
    if tensor is None:
        return 0
    values = plain_floats(tensor)
    kept.append(values)
    return values.data_ptr()
