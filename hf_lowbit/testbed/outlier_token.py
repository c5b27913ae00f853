"""A text-conditioned denoiser that computes what it did, on texts whose first token is an outlier.

In large models the begin-of-sequence token of the text is tens of times larger than all others (MixDQ, arXiv
2405.17873, measures 828 against 10 to 15 in SDXL-Turbo); in a small one it need not be. Channels are added that are
zero for all tokens but the first, and that keys and values read with weights of zero.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.first_token import find_text_layers
from hf_lowbit.calibration.units import Batch

RATIO = 828 / 15  # of the first token's largest value to the others', in SDXL-Turbo


@torch.no_grad()
def with_wider_text(denoiser: nn.Module, batch: Batch, channels: int = 4) -> nn.Module:
    """A copy whose cross-attention reads so many channels more.

    Args:
        denoiser: of diffusers, float.
        batch: keyword arguments of its forward, which show the layers that read the text.
    """
    wider = copy.deepcopy(denoiser)
    for name in find_text_layers(wider, batch):
        layer = wider.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.in_features += channels
        layer.weight = nn.Parameter(nn.functional.pad(layer.weight, (0, channels)))
    config: Any = getattr(wider, "config", {})
    if "cross_attention_dim" in config:
        register: Any = wider.register_to_config
        register(cross_attention_dim=config["cross_attention_dim"] + channels)
    return wider


def outlier_size(text: Tensor) -> float:
    """:data:`RATIO` times the largest value of all tokens but the first of ``[batch, tokens, in]``."""
    return RATIO * text[:, 1:].abs().amax().item()


def with_outlier(text: Tensor, size: float, channels: int = 4) -> Tensor:
    """Tokens ``[batch, tokens, in]`` with the new channels: ``size`` in the first token, zero in all others."""
    added = torch.zeros(*text.shape[:2], channels, dtype=text.dtype, device=text.device)
    added[:, 0] = size
    return torch.cat([text, added], -1)
