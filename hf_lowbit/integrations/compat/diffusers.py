"""Private and undocumented names of diffusers."""

from __future__ import annotations

from typing import Any

# diffusers has no public way to add a quantization method: its registries are the dictionaries themselves.
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer

__all__ = [
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "DiffusersQuantizer",
    "forget_quantized",
    "keep_in_fp32",
    "mark_quantized",
    "store_config",
]


def keep_in_fp32(model: Any) -> tuple[str, ...]:
    """Names of modules that a diffusers model keeps in float32."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def store_config(model: Any, config: Any) -> None:
    """Make ``save_pretrained`` write this quantization config."""
    model.register_to_config(quantization_config=config)


def mark_quantized(model: Any, quantizer: DiffusersQuantizer) -> None:
    """Set the attributes by which diffusers knows a quantized model, as ``from_pretrained`` does."""
    config = quantizer.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, config.quant_method
    store_config(model, config)


def forget_quantized(model: Any) -> None:
    """Remove what diffusers' own ``dequantize`` leaves behind, so that a saved float model loads as one."""
    kept = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = type(model.config)(kept)
    model.__dict__.pop("quantization_method", None)
