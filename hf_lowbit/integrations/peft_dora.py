"""DoRA on packed modules: PEFT's variants, with a decoded base layer where they read its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.integrations.compat import peft as compat
from hf_lowbit.nn import PackedModule


class _FloatView:
    """A LoRA layer as DoRA's forward reads it: with a decoded base layer."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def get_base_layer(self) -> nn.Module:
        """The float form of a packed base layer, with its own bias and a weight without gradient."""
        base: nn.Module = self._layer.get_base_layer()
        if not isinstance(base, PackedModule):
            return base
        decoded = base.to_float(self._dtype)
        decoded.get_parameter("weight").requires_grad_(False)
        return decoded


class _OnPacked:
    """Decodes the weight for DoRA's norm once per forward, which is small beside what DoRA itself computes."""

    def forward(self, module: Any, *, x: Tensor, **kwargs: Any) -> Any:
        """As PEFT's variant."""
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return super().forward(_FloatView(module, dtype), x=x, **kwargs)  # type: ignore[misc]


class PackedDoraLinear(_OnPacked, compat.DoraLinearVariant):  # type: ignore[misc]
    """PEFT's ``DoraLinearVariant``."""


class PackedDoraEmbedding(_OnPacked, compat.DoraEmbeddingVariant):  # type: ignore[misc]
    """PEFT's ``DoraEmbeddingVariant``."""


class PackedDoraConv1d(_OnPacked, compat.DoraConv1dVariant):  # type: ignore[misc]
    """PEFT's ``DoraConv1dVariant``."""


class PackedDoraConv2d(_OnPacked, compat.DoraConv2dVariant):  # type: ignore[misc]
    """PEFT's ``DoraConv2dVariant``."""
