"""Quantization of a layer's input: per token, per token and group, or with scales that are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec


class Codes(NamedTuple):
    """Quantized inputs: x is about scale * codes + shift.

    Attributes:
        codes: ``[tokens, columns]``: int8, float8, or the values of a smaller floating-point format, which bfloat16
            holds exactly.
        scale: float32 ``[tokens, groups]``.
        shift: the same; None where it is zero.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None


def quantize_tokens(
    x: Tensor, spec: ActivationSpec, input_scale: Tensor | None = None, input_shift: Tensor | None = None
) -> Codes:
    """Codes of each token (row), and the scales they are in.

    Symmetric ones cover -(2^(b-1)-1) .. 2^(b-1)-1 (SmoothQuant's restricted range, arXiv 2211.10438). Asymmetric ones
    are those of torch and of Q-Diffusion (arXiv 2302.04304): q = round(x / s) + z in 0 .. 2^b - 1, from the smallest
    value to the largest, both with zero, which is exact. Less an integer they are int8: z, where 4 or 6 bits have a
    scale per token, so that what multiplies is s (q - z) and nothing is left to add; else 2^(b-1), and the shift is
    s (2^(b-1) - z). Static ones are clipped to their range.

    Args:
        x: float ``[tokens, columns]``.
        input_scale, input_shift: of a static spec, float32 ``[groups]``, or ``[tokens, groups]`` where tokens differ;
            None: those of x as a whole, while they are not known yet.

    Returns:
        The codes; of one group where the spec has none. A group of inputs with NaN or infinity has a scale of NaN or
        infinity, so that its product is not finite either.

    Raises:
        SpecError: a group that does not divide the columns.
    """
    groups = spec.groups(x.shape[-1])
    if input_scale is not None and input_shift is None and groups == 1 and input_scale.dim() == 1:
        x = x.float()  # the shortest way: a token of a small model takes dozens of these
        return Codes(_codes(x / input_scale, spec), torch.add(input_scale, x.sum(-1, keepdim=True), alpha=0))
    grouped = x.float().unflatten(-1, (groups, x.shape[-1] // groups))
    if spec.static:
        codes, scale, shift = _static(grouped, spec, input_scale, input_shift)
    else:
        codes, scale, shift = _dynamic(grouped, spec)
    return Codes(codes.flatten(1), scale.squeeze(-1), None if shift is None else shift.squeeze(-1))


def restore_tokens(codes: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """float32 values ``[tokens, columns]`` of codes and scales of :func:`quantize_tokens`."""
    grouped = codes.float().unflatten(-1, (scale.shape[-1], codes.shape[-1] // scale.shape[-1])) * scale.unsqueeze(-1)
    return (grouped if shift is None else grouped + shift.unsqueeze(-1)).flatten(1)


def integer_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of the asymmetric codes -2^(b-1) .. 2^(b-1)-1 that cover ``low`` .. ``high`` and zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2.0**bits - 1)
    zero = _in_steps(-low, scale).round().nan_to_num(0.0)
    return scale, scale * (2.0 ** (bits - 1) - zero)


def _dynamic(x: Tensor, spec: ActivationSpec) -> Codes:
    """Codes like x, and scales for its last dimension."""
    if spec.symmetric:
        scale = x.abs().amax(-1, keepdim=True) / spec.limit
        return Codes(_codes(_in_steps(x, scale), spec), scale)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, shift = integer_grid(low, high, spec.bits)
    if spec.has_shift:
        return Codes(_shifted(x, scale, shift, spec), scale, shift)
    steps = 2.0**spec.bits - 1
    zero = _in_steps(-low.clamp(max=0), scale).round().nan_to_num(0.0)
    codes = _in_steps(x, scale).round().nan_to_num(0.0)
    return Codes(codes.clamp(-zero, steps - zero).to(torch.int8), scale)


def _static(x: Tensor, spec: ActivationSpec, scale: Tensor | None, shift: Tensor | None) -> Codes:
    if scale is None:
        scale, shift = _of_call(x, spec)
    else:
        scale, shift = scale.unsqueeze(-1), None if shift is None else shift.unsqueeze(-1)
    codes = _codes(_in_steps(x, scale), spec) if shift is None else _shifted(x, scale, shift, spec)
    undefined = 0 * x.sum(-1, keepdim=True)  # NaN where a token is not finite, in one pass over it
    return Codes(codes, scale + undefined, None if shift is None else shift + undefined)


def _of_call(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and shift ``[1, groups, 1]`` of all tokens of a call together."""
    if not x.shape[0]:
        one = x.new_ones(1, x.shape[1], 1)
        return one, 0 * one if spec.has_shift else None
    if not spec.has_shift:
        return x.abs().amax((0, -1), keepdim=True) / spec.limit, None
    low, high = x.amin((0, -1), keepdim=True), x.amax((0, -1), keepdim=True)
    if not spec.symmetric:
        return integer_grid(low, high, spec.bits)
    if (split := spec.floating_point) is not None and not split.signed:
        return (high - low) / spec.limit, low
    return (high - low) / 2 / spec.limit, (high + low) / 2


def _shifted(x: Tensor, scale: Tensor, shift: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.symmetric:  # a float around its centre
        return _codes(_in_steps(x - shift, scale), spec)
    half = 2.0 ** (spec.bits - 1)
    codes = _in_steps(x, scale).round_().sub_(_in_steps(shift, scale).round_())
    return codes.nan_to_num_(0.0).clamp_(-half, half - 1).to(torch.int8)


def _in_steps(x: Tensor, scale: Tensor) -> Tensor:
    """Each scale by itself: one of zero, of a token of zeros, changes no other token's."""
    return x / torch.where(scale == 0, torch.ones_like(scale), scale)


def _codes(scaled: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.format == "int":
        limit = 2 ** (spec.bits - 1) - 1
        return scaled.round_().nan_to_num_(0.0).clamp_(-limit, limit).to(torch.int8)  # nobody else's
    if spec.format == "float8_e4m3fn":
        return scaled.clamp(-spec.limit, spec.limit).to(torch.float8_e4m3fn)
    split = spec.floating_point
    assert split is not None
    return split.round(scaled).nan_to_num(0.0).to(torch.bfloat16)
