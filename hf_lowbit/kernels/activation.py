"""Quantization of a layer's input: per token, per token and group, or with a scale that is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec


def quantize_tokens(x: Tensor, spec: ActivationSpec, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of each token (row), and the scales they are in: x is about scale * codes.

    Symmetric ones cover -(2^(b-1)-1) .. 2^(b-1)-1 (SmoothQuant's restricted range, arXiv 2211.10438). Asymmetric ones
    are q - z of q in 0 .. 2^b - 1, from the token's smallest value to its largest, both with zero: what multiplies is
    s (q - z), so that no zero point is left for the product. Static ones are clipped to their range.

    Args:
        x: float ``[tokens, columns]``.
        input_scale: of a static spec, float32 ``[1]``; None: that of x as a whole, while it is not known yet.

    Returns:
        int8 codes, or float8_e4m3fn values; and the float32 scales ``[tokens, groups]``, of one group where the spec
        has none. A group of inputs with NaN or infinity has a scale of NaN or infinity, so that its product is not
        finite either.

    Raises:
        SpecError: a group that does not divide the columns.
    """
    x = x.float()
    if spec.static:
        return _static(x, spec, input_scale)
    if spec.group_size is None:
        return _dynamic(x, spec)
    codes, scale = _dynamic(x.unflatten(-1, (spec.groups(x.shape[-1]), -1)), spec)
    return codes.flatten(1), scale.squeeze(-1)


def restore_tokens(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 values ``[tokens, columns]`` of codes and scales of :func:`quantize_tokens`."""
    if scale.shape[-1] == 1:
        return codes.float() * scale
    return (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(1)


def _dynamic(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """Codes like x, and a scale for its last dimension."""
    if not spec.symmetric:
        return _asymmetric(x, 2.0**spec.bits - 1)
    scale = x.abs().amax(-1, keepdim=True) / spec.limit
    return _codes(_in_steps(x, scale), spec), scale


def _static(x: Tensor, spec: ActivationSpec, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1, keepdim=True)
    if input_scale is None:
        input_scale = largest.amax(0) / spec.limit if x.shape[0] else largest.new_ones(1)
    return _codes(_in_steps(x, input_scale), spec), input_scale + 0 * largest  # NaN where a token is not finite


def _asymmetric(x: Tensor, steps: float) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / steps
    zero = _in_steps(-low, scale).round().nan_to_num(0.0)
    codes = _in_steps(x, scale).round().nan_to_num(0.0)
    return codes.clamp(-zero, steps - zero).to(torch.int8), scale


def _in_steps(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale == 0, torch.ones_like(scale), scale)


def _codes(scaled: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.format == "float8_e4m3fn":
        return scaled.clamp(-spec.limit, spec.limit).to(torch.float8_e4m3fn)
    return scaled.round().nan_to_num(0.0).clamp(-spec.limit, spec.limit).to(torch.int8)
