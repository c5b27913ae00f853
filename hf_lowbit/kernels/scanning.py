"""Convolutions and scans, each by kernels or the torch reference. Eager: see scan_ops for traced code."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.kernels import cpu, triton
from hf_lowbit.kernels.operand import Convolution, Operand, Recurrence, codes_of, float_values, quantize_codes
from hf_lowbit.kernels.recurrence import convolve, scan, time_steps
from hf_lowbit.kernels.routes import gpu_runs, why_not


def convolution(given: Convolution, update: bool, dtype: torch.dtype, backend: str | None) -> Tensor:
    """:func:`hf_lowbit.kernels.causal_convolution`, of arguments that fit."""
    x, weight, bias, state, silu, out_scale = given
    if (kernels := _kernels(backend, (x.values, state), (weight, bias))) is not None:
        kept = state if state is None or state.is_contiguous() else state.contiguous()
        result: Tensor = kernels.causal_convolution(given._replace(state=kept), update, dtype)
        if update and state is not None and kept is not state and kept is not None:
            state.copy_(kept)
        return result
    values, context = float_values(x), None
    is_coded = state is not None and state.dtype == torch.int8
    if state is not None:
        past = float_values(Operand(state.transpose(1, 2), x.scale if is_coded else None))
        context = past[:, 1:].to(values.dtype)
    result = convolve(values, weight, bias, context)
    result = F.silu(result) if silu else result
    if update and state is not None:
        newest = codes_of(x) if is_coded else values
        together = torch.cat([state, newest.detach().transpose(1, 2).to(state.dtype)], 2)
        state.copy_(together[..., -state.shape[2] :])
    return result.to(dtype) if out_scale is None else quantize_codes(result, out_scale)


def selective_scan(
    given: Recurrence,
    return_state: bool,
    update: bool,
    peaks_every: int | None,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`hf_lowbit.kernels.selective_scan`, of arguments that fit: output, last state, peaks."""
    x, dt, A, B, C, D, z, dt_bias, _, state, state_scale, _ = given
    gate = None if z is None else z.values
    inputs = x.values, dt.values, B.values, C.values, gate, state
    if (kernels := _kernels(backend, inputs, (A, D, dt_bias))) is not None:
        before, after = state, None
        if state is not None and not (state.is_contiguous() and state.dtype in (torch.float32, torch.int8)):
            before = (state if state.dtype == torch.int8 else state.float()).contiguous()
        coded = torch.float32 if state_scale is None else torch.int8
        if update and before is state and state is not None and state.dtype == coded:
            after = state
        elif update or return_state:
            size = x.values.shape[0], x.values.shape[2], B.values.shape[3]
            after = torch.empty(size, dtype=coded, device=x.values.device)
        y, peaks = kernels.selective_scan(given._replace(state=before), after, peaks_every, dtype)
    else:
        y, after, peaks = _by_reference(given, peaks_every, dtype)
    if update and state is not None and after is not None and after is not state:
        after = state.copy_(after.detach())
    return y, after if update or return_state else None, peaks


def _by_reference(
    given: Recurrence,
    peaks_every: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, dt, A, B, C, D, z, dt_bias, dt_limit, state, state_scale, state_cluster = given
    batch, _, channels = x.values.shape
    heads, n = dt.values.shape[2], B.values.shape[3]
    wide = torch.promote_types(x.values.dtype, torch.float32)
    rows = None
    if state_scale is not None:
        rows = state_scale[:1] if state_cluster is None else state_scale[state_cluster]
    if state is None:
        before = torch.zeros(batch, channels, n, dtype=wide, device=x.values.device)
    else:
        before = float_values(Operand(state, rows if state.dtype == torch.int8 else None)).to(wide)
    shape = heads, channels // heads
    values = float_values(x).to(wide).unflatten(2, shape)
    steps = time_steps(float_values(dt).to(wide), dt_bias, dt_limit)
    inputs = A.to(wide), float_values(B).to(wide), float_values(C).to(wide)
    y, after, peaks = scan(values, steps, *inputs, before.unflatten(1, shape), peaks_every)
    y = (y if D is None else y + D[:, None] * values).flatten(2)
    y = y if z is None else y * F.silu(float_values(z))
    after = after.flatten(1, 2)
    after = after if rows is None else quantize_codes(after, rows)
    return y.to(dtype), after, None if peaks is None else peaks.flatten(2, 3).float()


def _kernels(
    backend: str | None, inputs: Sequence[Tensor | None], parameters: Sequence[Tensor | None]
) -> ModuleType | None:
    """The package whose kernels run there, where nothing asks for gradients; None: torch does it.

    Raises:
        ValueError: a backend that does not run on this machine.
    """
    if reason := why_not(backend):
        raise ValueError(reason)
    first = inputs[0]
    assert first is not None
    kernels = cpu if first.is_cpu and backend in (None, "cpu") else triton if gpu_runs(first.device, backend) else None
    if kernels is None or (kernels is cpu and not cpu.available()):
        return None
    for tensor in inputs:
        if tensor is not None and (tensor.device != first.device or tensor.dtype not in kernels.VALUE_TYPES):
            return None
    if torch.is_grad_enabled():
        for tensor in (*inputs, *parameters):
            if tensor is not None and tensor.requires_grad:
                return None
    return kernels
