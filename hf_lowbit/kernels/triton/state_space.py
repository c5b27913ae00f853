"""The Triton scan and convolution of state-space mixers, on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.kernels.operand import Convolution, Recurrence

SEGMENT = 16  # tokens, at least, that are scanned one after the other, or as one product
MOST_STATES = 1 << 28  # kept at once, one of each segment: 1 GiB
VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def selective_scan(
    given: Recurrence,
    new_state: Tensor | None,
    peaks_every: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """:func:`hf_lowbit.kernels.selective_scan`: the output and the peaks; the last state goes into ``new_state``.

    The state before and ``new_state`` are contiguous, float32 or int8, and may be the same.
    """
    batch, tokens, channels = given.x.values.shape
    n, device = given.B.values.shape[3], given.x.values.device
    y = torch.empty(batch, tokens, channels, dtype=dtype, device=device)
    if not y.numel():
        return y, None if peaks_every is None else torch.empty(batch, 0, channels, n, device=device)
    from hf_lowbit.kernels.triton.scan_launch import launch_scan

    window = peaks_every or 1
    span = max(1, MOST_STATES // (batch * channels * n) * SEGMENT // window) * window
    if tokens <= span:
        return y, launch_scan(given, new_state, y, peaks_every)
    peaks = []
    for first in range(0, tokens, span):
        part = slice(first, first + span)
        after = new_state if first + span >= tokens else torch.empty(batch, channels, n, device=device)
        peaks.append(launch_scan(_part(given, part), after, y[:, part], peaks_every))
        given = given._replace(state=after)
    return y, None if peaks_every is None else torch.cat([peak for peak in peaks if peak is not None], 1)


def _part(given: Recurrence, part: slice) -> Recurrence:
    """Some tokens of a scan."""
    x, dt, B, C = (o._replace(values=o.values[:, part]) for o in (given.x, given.dt, given.B, given.C))
    z = None if given.z is None else given.z._replace(values=given.z.values[:, part])
    return given._replace(x=x, dt=dt, B=B, C=C, z=z)


def causal_convolution(given: Convolution, update: bool, dtype: torch.dtype) -> Tensor:
    """:func:`hf_lowbit.kernels.causal_convolution`; ``state`` is contiguous, and changed in place with ``update``."""
    values, dtype = given.x.values, dtype if given.out_scale is None else torch.int8
    y = torch.empty(values.shape, dtype=dtype, device=values.device)
    if y.numel():
        from hf_lowbit.kernels.triton.scan_launch import launch_convolution

        launch_convolution(given, update, y)
    return y
