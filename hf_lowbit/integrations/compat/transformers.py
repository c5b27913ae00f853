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
    "mark_initialized",
    "mark_quantized",
    "name_or_path",
    "output_embeddings",
    "tie_companions",
    "tied_weights",
    "was_loaded",
]


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the parameter it shares storage with (``all_tied_weights_keys``)."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie_companions(model: nn.Module, target: str, source: str) -> None:
    """Make transformers tie one more pair of parameters, and leave the first out of saved files."""
    keys: Any = model.all_tied_weights_keys
    keys[target] = source


def keep_in_fp32(model: nn.Module) -> tuple[str, ...]:
    """Patterns of modules that a transformers model keeps in float32."""
    names: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    strict: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple({*names, *strict})


def base_model_prefix(model: nn.Module) -> str:
    """Prefix under which a model with a head holds its base ("model", "transformer"), or ""."""
    return str(getattr(model, "base_model_prefix", "") or "")


def mark_quantized(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Set the attributes by which transformers knows a quantized model, as ``from_pretrained`` does."""
    from transformers.quantizers.base import _assign_is_quantized

    config = quantizer.quantization_config
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": config.quant_method}
    for name, value in attributes.items():
        object.__setattr__(model, name, value)
    model_config: Any = model.config
    model_config.quantization_config = config
    _assign_is_quantized(model)


def name_or_path(model: Any) -> str:
    """Folder or repository that a model was loaded from."""
    return str(model.config.name_or_path)


def output_embeddings(model: Any) -> nn.Module | None:
    """A model's output projection; None for models without one."""
    module: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from drawing random numbers into a module whose weights it has not seen arrive (offload)."""
    object.__setattr__(module, "_is_hf_initialized", True)


def was_loaded(parameter: nn.Parameter) -> bool:
    """True for a parameter that came from the checkpoint, or lies offloaded on disk."""
    return parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
