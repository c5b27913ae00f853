"""A compensation adapter as what fine-tuning starts from, instead of a frozen part of the base."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hf_lowbit.integrations.adapters import ADAPTER, adapted_layers, adapter_names
from hf_lowbit.integrations.compat.adapters import set_adapters_loaded
from hf_lowbit.plan import replace_modules


def trainable_compensation(model: Any) -> Any:
    """Let the compensation adapter be trained.

    Returns:
        For a transformers model, a PeftModel around it whose only adapter, "lowbit", is the compensation: what
        ``Trainer`` saves in its checkpoints and resumes from. ``save_pretrained`` of its ``get_base_model()`` writes
        packed weights and trained adapter, so that ``from_pretrained`` of that folder finds both. A diffusers model
        is returned as it is, its compensation trainable, and saves both by its own ``save_pretrained``.

    Raises:
        ValueError: there is no compensation adapter, it is merged, or other adapters are on the model.
    """
    names, layers = adapter_names(model), adapted_layers(model)
    if ADAPTER not in names:
        raise ValueError(
            'train_compensation=True trains the adapter of low_rank=LowRankConfig(rank, keep="adapter"), which this '
            "model does not have; add a new adapter with get_peft_model instead"
        )
    if others := ", ".join(sorted(names - {ADAPTER})):
        raise ValueError(f"train_compensation=True trains the compensation alone: remove {others} first")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the compensation is merged into the weights; unmerge it before it is trained")
    if not _is_transformers(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name and ADAPTER in name.split("."):
                parameter.data = parameter.data.float()  # small steps are lost in 16 bits
                parameter.requires_grad_(True)
        return model
    return _wrapped(model, layers)


def _wrapped(model: Any, layers: dict[str, Any]) -> Any:
    """The PEFT model: PEFT puts its layers on the bare packed modules, and the factors come back."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = False
    if model.can_generate() and not model.config.is_encoder_decoder:
        config.task_type = "CAUSAL_LM"
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {f"base_model.model.{key}": value.to(torch.float32, copy=True) for key, value in state.items()}
    replace_modules(model, {name: layer.get_base_layer() for name, layer in layers.items()})
    set_adapters_loaded(model, False)
    model.__dict__.pop("peft_config", None)
    wrapped = get_peft_model(model, config, ADAPTER)
    result: Any = set_peft_model_state_dict(wrapped, tensors, ADAPTER)
    if result.unexpected_keys:
        raise RuntimeError(f"PEFT adapts other layers than the compensation: {', '.join(result.unexpected_keys[:3])}")
    return wrapped


def _is_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
