"""The PEFT adapter: LoRA on every packed module that PEFT adapts in its float form, and preparation for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_lowbit.integrations.compat import peft as compat
from hf_lowbit.integrations.peft_compensation import trainable_compensation
from hf_lowbit.integrations.peft_layers import LORA_LAYERS, PackedLoraLinear
from hf_lowbit.nn import PackedConv1D, PackedModule
from hf_lowbit.state import state_of


def prepare_for_training(model: Any, gradient_checkpointing: bool = True, train_compensation: bool = False) -> Any:
    """Prepare a quantized model for training adapters on it; call it before ``get_peft_model`` or ``add_adapter``.

    Unlike PEFT's ``prepare_model_for_kbit_training`` it leaves bfloat16 and float32 as they are: norms compute in
    float32 by themselves, and upcasting frozen weights would only make every activation float32. float16 weights
    (norms, embeddings, heads, biases) do become float32, because gradients underflow in float16 without loss scaling.

    Args:
        model: of transformers or diffusers, or a PEFT model around one; changed in place.
        gradient_checkpointing: recompute activations in backward instead of keeping them, without reentrance.
        train_compensation: train the adapter that repairs the rounding (``low_rank`` with keep="adapter"), as LoftQ
            (arXiv 2310.08659) initialises fine-tuning, instead of a new one beside it.

    Returns:
        The same model, in which nothing but adapters requires gradients. With ``train_compensation`` a transformers
        model comes back as a PEFT model, ready for ``Trainer``; ``model.get_base_model().save_pretrained(folder)``
        then saves packed weights and trained adapter for ``from_pretrained(folder)``.

    Raises:
        ValueError: the model is not quantized by hf_lowbit, cannot checkpoint gradients, or has no compensation.
    """
    if state_of(model) is None:
        raise ValueError("prepare_for_training is for models quantized by hf_lowbit; this one is not")
    for name, parameter in model.named_parameters():
        if not _is_adapter(name):
            parameter.requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16:
            tensor.data = tensor.data.float()
    if gradient_checkpointing:
        _checkpoint_gradients(model)
    return trainable_compensation(model) if train_compensation else model


def _is_adapter(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("lora_") for part in parts) or "modules_to_save" in parts


def _checkpoint_gradients(model: Any) -> None:
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers renamed it
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is not None:
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    elif hasattr(model, "enable_gradient_checkpointing"):  # diffusers, which never re-enters
        model.enable_gradient_checkpointing()
    else:
        raise ValueError(f"{type(model).__name__} cannot checkpoint gradients; pass gradient_checkpointing=False")


def dispatch_packed(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """The LoRA layer of a packed module; None for other modules, and for those that PEFT does not adapt.

    Raises:
        ValueError: ``target_parameters`` names a packed parameter, or another kind of adapter is on the module.
    """
    base = target.get_base_layer() if isinstance(target, compat.BaseTunerLayer) else target
    if not isinstance(base, PackedModule):
        return None
    where = kwargs.get("target_name") or type(base).__name__
    if parameter_name is not None:
        raise ValueError(
            f"target_parameters names {parameter_name!r} of {where}, which hf_lowbit has packed: PEFT would add to its "
            'codes. (In MoE models "all-linear" and the names of expert projections stand for such parameters.) Target '
            "other modules, such as those of attention, or leave the experts in full precision with "
            "modules_to_not_convert"
        )
    if base is not target:
        raise ValueError(f"{where} has an adapter of another kind ({type(target).__name__}): LoRA cannot be put on top")
    layer_class = next((layer for packed, layer in LORA_LAYERS.items() if isinstance(base, packed)), None)
    if layer_class is None:
        return None
    if issubclass(layer_class, PackedLoraLinear):
        config.fan_in_fan_out = kwargs["is_target_conv_1d_layer"] = isinstance(base, PackedConv1D)
    layer: nn.Module = layer_class(target, adapter_name, config=config, **kwargs)
    return layer


def register_all() -> None:
    """Make PEFT know the packed modules. Calling it twice is harmless."""
    compat.dispatch_first(dispatch_packed)


register_all()
