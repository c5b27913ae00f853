"""Dynamic per-token quantization of a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantize_tokens(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """Codes of each token (row), with the token's own scale: x is about scale * codes.

    Symmetric ones cover -(2^(b-1)-1) .. 2^(b-1)-1 (SmoothQuant's restricted range, arXiv 2211.10438). Asymmetric ones
    are q - z of q in 0 .. 2^b - 1, from the token's smallest value to its largest, both with zero: what multiplies is
    s (q - z), so that no zero point is left for the product.

    Args:
        x: float ``[tokens, columns]``.

    Returns:
        int8 codes, or float8_e4m3fn values; and the float32 scale ``[tokens, 1]``. A token with NaN or infinity has a
        scale of NaN or infinity, so that its product is not finite either.
    """
    x = x.float()
    if not spec.symmetric:
        return _asymmetric(x, 2.0**spec.bits - 1)
    largest = x.abs().amax(-1, keepdim=True)
    limit = _FLOAT8_MAX if spec.format == "float8_e4m3fn" else 2.0 ** (spec.bits - 1) - 1
    scale = largest / limit
    scaled = _in_steps(x, scale)
    if spec.format == "float8_e4m3fn":
        return scaled.clamp(-limit, limit).to(torch.float8_e4m3fn), scale
    return scaled.round().nan_to_num(0.0).clamp(-limit, limit).to(torch.int8), scale


def _asymmetric(x: Tensor, steps: float) -> tuple[Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / steps
    zero = _in_steps(-low, scale).round().nan_to_num(0.0)
    codes = _in_steps(x, scale).round().nan_to_num(0.0)
    return codes.clamp(-zero, steps - zero).to(torch.int8), scale


def _in_steps(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale == 0, torch.ones_like(scale), scale)
