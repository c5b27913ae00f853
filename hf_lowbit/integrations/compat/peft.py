"""Private and undocumented names of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft.tuners.lora.model as lora_model
from peft.tuners.lora.layer import Conv1d, Conv2d, Embedding, Linear
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

__all__ = [
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "Embedding",
    "Linear",
    "active_adapters",
    "check_adapters_to_merge",
    "dispatch_first",
    "set_active_adapters",
]

_MARK = "_lowbit_dispatcher"
_MODULE: Any = lora_model


def dispatch_first(dispatcher: Callable[..., nn.Module | None]) -> None:
    """Ask ``dispatcher`` for the LoRA layer of a module before PEFT's default one. Calling it twice is harmless.

    ``LoraModel._create_new_module`` looks ``dispatch_default`` up at every call, whatever led there: get_peft_model,
    PeftModel.from_pretrained, load_adapter and add_adapter of transformers and diffusers.
    """
    default = _MODULE.dispatch_default
    if getattr(default, _MARK, False):
        return

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        layer = dispatcher(target, adapter_name, config=config, **kwargs)
        if layer is None:
            layer = default(target, adapter_name, config=config, **kwargs)
        return layer

    setattr(dispatch, _MARK, True)
    _MODULE.dispatch_default = dispatch


def active_adapters(layer: Any) -> list[str]:
    """Names of the adapters that a layer computes with."""
    return list(layer.active_adapters)


def set_active_adapters(layer: Any, names: list[str]) -> None:
    """Change which adapters a layer computes with, and nothing about their training."""
    layer._active_adapter = names
