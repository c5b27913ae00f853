"""What transformers and diffusers remember of PEFT adapters on a model, in private attributes.

They stand apart from the other names because they need neither library: importing transformers' quantizers here would
start the registration of :mod:`hf_lowbit.integrations.transformers`, which imports those who use them.
"""

from __future__ import annotations

from typing import Any


def adapters_loaded(model: Any) -> bool:
    """Whether transformers (or diffusers, whose mixin has the same flag) holds that PEFT adapters are on the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def set_adapters_loaded(model: Any, loaded: bool) -> None:
    """Tell the library so; models without support for adapters have no such flag."""
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = loaded


def weight_conversions(model: Any) -> Any:
    """How a transformers model's tensors were renamed and merged when it was loaded; saving reverses it."""
    return getattr(model, "_weight_conversions", None)


def set_weight_conversions(model: Any, conversions: Any) -> None:
    """Put :func:`weight_conversions` back: ``load_adapter`` leaves those of the adapter in their place."""
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = conversions
