"""Dynamic per-token quantization of a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantize_tokens(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """Symmetric codes of each token (row), with the token's own scale.

    Args:
        x: float ``[tokens, columns]``.

    Returns:
        int8 codes in -(2^(b-1)-1) .. 2^(b-1)-1 (SmoothQuant's restricted range, arXiv 2211.10438), or float8_e4m3fn
        values; and the float32 scale ``[tokens, 1]``. A token with NaN or infinity has a scale of NaN or infinity, so
        that its product is not finite either.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    limit = _FLOAT8_MAX if spec.format == "float8_e4m3fn" else 2.0 ** (spec.bits - 1) - 1
    scale = largest / limit
    scaled = x / torch.where(scale == 0, torch.ones_like(scale), scale)
    if spec.format == "float8_e4m3fn":
        return scaled.clamp(-limit, limit).to(torch.float8_e4m3fn), scale
    return scaled.round().nan_to_num(0.0).clamp(-limit, limit).to(torch.int8), scale
