"""The reference in torch of what state-space mixers compute between their projections: differentiable, on any device.

Neither form runs through the tokens one by one: Mamba's recurrence has one decay per channel and state and is taken
apart into runs that advance side by side; Mamba-2's has one decay per head, so that a run of tokens is a small masked
product (Dao & Gu 2024, arXiv:2405.21060, section 6).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_STATES = 1 << 22  # kept at once, of a segment of tokens
_CHUNK = 64  # tokens per masked product


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None) -> Tensor:
    """Depthwise causal convolution of x ``[batch, T, channels]`` with ``[channels, taps]``.

    Args:
        context: ``[batch, taps - 1, channels]`` inputs before the first one; None: zeros.
    """
    before = weight.shape[1] - 1
    padded = F.pad(x, (0, 0, before, 0)) if context is None else torch.cat([context, x], 1)
    kernel, offset = weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv1d(padded.mT, kernel, offset, groups=x.shape[2]).mT


def time_steps(dt: Tensor, bias: Tensor | None, limit: tuple[float, float]) -> Tensor:
    """softplus(dt + bias) within ``limit``."""
    steps = F.softplus(dt if bias is None else dt + bias)
    return steps if limit == (0.0, math.inf) else steps.clamp(*limit)


def scan(
    x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, peaks_every: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h_t = exp(step_t A) h_(t-1) + step_t x_t B_t and y_t = C_t h_t.

    Args:
        x: ``[batch, T, H, P]``; all tensors of one floating type.
        steps: ``[batch, T, H]``.
        A: ``[H, n]`` or ``[H]``.
        B, C: ``[batch, T, G, n]``; head h reads group h // (H / G).
        state: ``[batch, H, P, n]``.

    Returns:
        y like x, the last state, and the peaks of |h| ``[batch, ceil(T / peaks_every), H, P, n]`` or None.
    """
    if A.dim() == 1 and peaks_every is None:
        return *_scan_in_chunks(x, steps, A, B, C, state), None
    return _scan_states(x, steps, A if A.dim() == 2 else A[:, None], B, C, state, peaks_every)


def _scan_in_chunks(x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    per_group = A.shape[0] // B.shape[2]
    outputs = []
    for own in range(0, x.shape[1], _CHUNK):
        inputs, b, c = ((t[:, own : own + _CHUNK]).transpose(1, 2) for t in (x * steps[..., None], B, C))
        log_decay = (steps[:, own : own + _CHUNK] * A).transpose(1, 2)
        since = log_decay[..., None].expand(*log_decay.shape, log_decay.shape[-1]).tril(-1).cumsum(-2)  # from s to t
        later = torch.ones_like(since, dtype=torch.bool).triu(1)
        scores = (c @ b.transpose(-1, -2)).repeat_interleave(per_group, 1)
        weights = scores * since.masked_fill(later, -math.inf).exp()
        b, c = b.repeat_interleave(per_group, 1), c.repeat_interleave(per_group, 1)
        from_start = log_decay.cumsum(-1).exp()[..., None]
        outputs.append(weights @ inputs + from_start * (c @ state.transpose(-1, -2)))
        to_end = since[..., -1, :, None].exp()
        state = state * from_start[..., -1:, :] + (inputs * to_end).transpose(-1, -2) @ b
    return torch.cat(outputs, 2).transpose(1, 2), state


def _scan_states(
    x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, peaks_every: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    per_group = A.shape[0] // B.shape[2]
    window = peaks_every or 1
    segment = max(1, _MOST_STATES // max(1, state.numel()) // window) * window
    outputs, peaks = [], []
    for own in range(0, x.shape[1], segment):
        part = slice(own, own + segment)
        b, c = (t[:, part].repeat_interleave(per_group, 2) for t in (B, C))
        step = steps[:, part, :, None]
        inputs = (step * x[:, part])[..., None] * b[..., None, :]
        states = _run(torch.exp(step * A)[..., None, :], inputs, state)
        outputs.append((states * c[..., None, :]).sum(-1))
        state = states[:, -1]
        if peaks_every is not None:
            sizes = states.detach().abs()
            padded = F.pad(sizes, (0,) * 7 + (-sizes.shape[1] % window,))
            peaks.append(padded.unflatten(1, (-1, window)).amax(2))
    return torch.cat(outputs, 1), state, torch.cat(peaks, 1) if peaks else None


def _run(decay: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """All states ``[batch, T, ...]`` of h = decay h + input: about 2 sqrt(T) steps, each over sqrt(T) runs at once."""
    tokens = inputs.shape[1]
    length = max(1, math.isqrt(tokens))
    missing = -tokens % length
    after = (0, 0) * (inputs.dim() - 2)
    decay = F.pad(decay, (*after, 0, missing), value=1.0).unflatten(1, (-1, length))
    inputs = F.pad(inputs, (*after, 0, missing)).unflatten(1, (-1, length))
    locals_, products = [inputs[:, :, 0]], [decay[:, :, 0]]
    for i in range(1, length):
        locals_.append(decay[:, :, i] * locals_[-1] + inputs[:, :, i])
        products.append(decay[:, :, i] * products[-1])
    before = []  # the state that each run begins with
    for run in range(inputs.shape[1]):
        before.append(state)
        state = products[-1][:, run] * state + locals_[-1][:, run]
    states = torch.stack(locals_, 2) + torch.stack(products, 2) * torch.stack(before, 1).unsqueeze(2)
    return states.flatten(1, 2)[:, :tokens]
