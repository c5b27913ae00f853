"""What a state-space mixer computes between its projections: the causal convolution and the selective scan.

Everything is token-major. Mamba (Gu & Dao 2023, arXiv:2312.00752) and Mamba-2 (Dao & Gu 2024, arXiv:2405.21060) are one
function: a head has P channels, and P = 1 is Mamba. Inputs are floats or int8 codes with stored scales (Quamba,
arXiv:2410.13229; Quamba2, arXiv:2503.22879); the arithmetic is float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.kernels import scan_ops, scanning
from hf_lowbit.kernels.operand import Convolution, Operand, Recurrence


class Scanned(NamedTuple):
    """What :func:`selective_scan` returns.

    Attributes:
        output: ``[batch, T, H * P]``.
        state: ``[batch, H * P, n]``, where it was asked for.
        peaks: float32 ``[batch, ceil(T / peaks_every), H * P, n]``: the largest ``|h|`` of each run of tokens.
    """

    output: Tensor
    state: Tensor | None
    peaks: Tensor | None


def causal_convolution(
    x: Operand,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None = None,
    *,
    silu: bool = True,
    out_scale: Tensor | None = None,
    update: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution over the tokens so far, then SiLU. Differentiable where nothing is int8.

    Args:
        x: ``[batch, T, channels]``.
        weight: float32 ``[channels, taps]``; ``bias`` ``[channels]``.
        state: ``[batch, channels, taps]``, the last ``taps`` inputs, which come before the first token; None: zeros.
            int8: codes of x's scale; floats: values.
        out_scale: float32 ``[1]`` or ``[channels]``: return int8 codes of it.
        update: put the last inputs into ``state``, in place.
        dtype: of a float result; None: that of float x, float32 for codes.
        backend: one of :data:`hf_lowbit.kernels.BACKENDS`, or None for the best.

    Returns:
        ``[batch, T, channels]``.

    Raises:
        ValueError: shapes that do not fit, codes without a scale.
    """
    channels, taps = weight.shape
    shape = x.values.shape
    if len(shape) != 3 or shape[2] != channels:
        raise ValueError(f"x {list(shape)} must be [batch, T, {channels}] for a weight {list(weight.shape)}")
    if state is None and update:
        raise ValueError("update=True needs a state to update")
    if state is not None and state.shape != (shape[0], channels, taps):
        raise ValueError(f"state {list(state.shape)} must be [{shape[0]}, {channels}, {taps}]")
    if x.scale is None and (x.values.dtype == torch.int8 or (state is not None and state.dtype == torch.int8)):
        raise ValueError("int8 inputs and an int8 state need the scale of x")
    given = Convolution(x, weight, bias, state, silu, out_scale)
    asked = update, dtype or _float_type(x), backend
    if torch.compiler.is_compiling() and not _wants_gradients(x.values, weight, bias) and backend != "reference":
        return scan_ops.convolution(given, *asked)
    return scanning.convolution(given, *asked)


def selective_scan(
    x: Operand,
    dt: Operand,
    A: Tensor,
    B: Operand,
    C: Operand,
    D: Tensor | None,
    *,
    z: Operand | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    state_cluster: Tensor | None = None,
    return_state: bool = False,
    update: bool = False,
    peaks_every: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Scanned:
    """y = C h + D x, times SiLU(z); h = exp(dt A) h + dt x B, dt = softplus(dt + bias). Differentiable without int8.

    Args:
        x: ``[batch, T, H * P]``; ``z`` likewise.
        dt: ``[batch, T, H]``.
        A: float32, negative: ``[H, n]`` (Mamba) or ``[H]`` (Mamba-2).
        B, C: ``[batch, T, G, n]``; head h reads group h // (H / G).
        D, dt_bias: ``[H]``.
        dt_limit: bounds of the step.
        state: ``[batch, H * P, n]`` before the first token, float32 or int8 codes; None: zeros.
        state_scale: float32 ``[clusters, n]`` or ``[clusters, 1]``: what a code of the state is worth. The states
            between the tokens of one call are float32 all the same.
        state_cluster: int32 ``[H * P]``, the row of ``state_scale`` of each channel; None: the first.
        return_state: return the last state: float32, or codes where there is a ``state_scale``.
        update: put it into ``state``, in place, and return that.
        peaks_every: return the peaks of every so many tokens.
        dtype: of the output; None: that of float x, float32 for codes.
        backend: one of :data:`hf_lowbit.kernels.BACKENDS`, or None for the best.

    Raises:
        ValueError: shapes that do not fit, codes without a scale.
    """
    given = Recurrence(x, dt, A, B, C, D, z, dt_bias, dt_limit, state, state_scale, state_cluster)
    _check(given)
    if state is None and update:
        raise ValueError("update=True needs a state to update")
    if peaks_every is not None and peaks_every < 1:
        raise ValueError(f"peaks_every is {peaks_every}, must be at least 1")
    asked = return_state, update, peaks_every, dtype or _float_type(x), backend
    if torch.compiler.is_compiling() and backend != "reference":
        inputs = x.values, dt.values, A, B.values, C.values, D, z and z.values, dt_bias
        if not _wants_gradients(*inputs):
            return Scanned(*scan_ops.selective_scan(given, *asked))
    return Scanned(*scanning.selective_scan(given, *asked))


def _float_type(x: Operand) -> torch.dtype:
    return torch.float32 if x.values.dtype == torch.int8 else x.values.dtype


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(given: Recurrence) -> None:
    x, dt, A, B, C, D, z, dt_bias, _, state, state_scale, state_cluster = given
    shape = batch, tokens, channels = x.values.shape
    of_group = _, _, groups, n = B.values.shape
    heads = A.shape[0]
    for name, tensor, wanted in (
        ("dt", dt.values, (batch, tokens, heads)),
        ("A", A, (heads,) if A.dim() == 1 else (heads, n)),
        ("B", B.values, (batch, tokens, groups, n)),
        ("C", C.values, of_group),
        ("z", z and z.values, shape),
        ("D", D, (heads,)),
        ("dt_bias", dt_bias, (heads,)),
        ("state", state, (batch, channels, n)),
        ("state_cluster", state_cluster, (channels,)),
    ):
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{name} {list(tensor.shape)} must be {list(wanted)} for x {list(shape)}")
    if channels % heads or heads % groups:
        raise ValueError(f"{channels} channels in {heads} heads in {groups} groups: each must divide the one before")
    for name, operand in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if operand is not None and operand.scale is None and operand.values.dtype == torch.int8:
            raise ValueError(f"int8 {name} needs a scale")
    if state_scale is None:
        if state is not None and state.dtype == torch.int8:
            raise ValueError("an int8 state needs a state_scale")
    elif state_scale.dim() != 2 or state_scale.shape[1] not in (1, n):
        raise ValueError(f"state_scale {list(state_scale.shape)} must be [clusters, 1] or [clusters, {n}]")
