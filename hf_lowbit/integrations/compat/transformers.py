"""Private and undocumented names of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

# transformers: the base of the op that is run on each tensor while a checkpoint loads.
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

__all__ = [
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "ConversionOps",
    "HfQuantizer",
    "base_model_prefix",
    "keep_in_fp32",
    "tie_companions",
    "tied_weights",
]


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the parameter it shares storage with (``all_tied_weights_keys``)."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie_companions(model: nn.Module, target: str, source: str) -> None:
    """Make transformers tie one more pair of parameters, and leave the first out of saved files."""
    model.all_tied_weights_keys[target] = source  # type: ignore[union-attr,operator,index]


def keep_in_fp32(model: nn.Module) -> tuple[str, ...]:
    """Patterns of modules that a transformers model keeps in float32."""
    names: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    strict: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple({*names, *strict})


def base_model_prefix(model: nn.Module) -> str:
    """Prefix under which a model with a head holds its base ("model", "transformer"), or ""."""
    return str(getattr(model, "base_model_prefix", "") or "")
