"""PEFT adapters on a model object: finding them, putting ours on, and looking past them when the model is saved.

Everything here works, and finds nothing, where PEFT is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.integrations.compat.adapters import (
    adapters_loaded,
    set_adapters_loaded,
    set_weight_conversions,
    weight_conversions,
)
from hf_lowbit.nn import CorruptWeightError
from hf_lowbit.plan import replace_modules

ADAPTER = "lowbit"  # the name of the compensation adapter: it belongs to the packed weights
_MARK = "(?#lowbit compensation)"  # a comment, as regular expressions have them


def marked(names: list[str], ranks: dict[str, int]) -> dict[str, int]:
    """A LoraConfig's rank_pattern (or alpha_pattern) that also says that its adapter is the compensation.

    PEFT keeps the pattern through saving and training, so that the adapter is known under whatever name it is loaded.

    Args:
        names: of the adapted modules, at least one.
        ranks: module -> rank.
    """
    return {f"{_MARK}{name}" if name == names[0] else name: ranks[name] for name in names}


def is_compensation(config: Any) -> bool:
    """Whether a LoraConfig is that of the compensation, or of an adapter trained from it."""
    return any(key.startswith(_MARK) for key in getattr(config, "rank_pattern", None) or {})


def rank_of(config: Any, name: str) -> int:
    """What :func:`marked` says of a module."""
    rank: int = config.rank_pattern.get(name, config.rank_pattern.get(f"{_MARK}{name}", config.r))
    return rank


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> outermost PEFT layer of every adapted module."""
    if "peft.tuners.tuners_utils" not in sys.modules:
        return {}
    from hf_lowbit.integrations.compat.peft import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {
        name: layer for name, layer in layers.items() if name.removesuffix(".base_layer") not in layers.keys() - {name}
    }


def adapter_names(model: nn.Module) -> set[str]:
    """Names of all adapters on a model."""
    parts = (getattr(layer, key, {}) for layer in adapted_layers(model).values() for key in layer.adapter_layer_names)
    return {name for part in parts for name in part}


def inject(model: nn.Module, config: Any, tensors: dict[str, Tensor]) -> None:
    """Put the compensation adapter on a model: active, frozen, in the model's own type, or float32 as it was trained.

    PEFT freezes the rest of the model, as it does under any first adapter, and leaves it as it is under later ones.

    Args:
        model: without adapters.
        config: a LoraConfig whose target modules are those of the tensors.
        tensors: "<module>.lora_A.weight" and so on.

    Raises:
        ValueError: PEFT adapts other layers than those.
        CorruptWeightError: tensors that do not fit the model.
    """
    from peft import inject_adapter_in_model

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inject_adapter_in_model(config, model, ADAPTER)
    set_adapters_loaded(model, True)
    layers = adapted_layers(model)
    planned = {key.partition(".lora_")[0] for key in tensors}
    if layers.keys() != planned:
        raise ValueError(
            f"PEFT adapts other layers than the compensation is of ({', '.join(sorted(layers.keys() ^ planned)[:3])}): "
            'in MoE models it takes some names for those of experts. Use low_rank keep="branch"'
        )
    for name, layer in layers.items():
        layer.train(model.training)
        device = _device(layer.get_base_layer())
        own = [key for key, _ in layer.named_parameters() if "lora_" in key and ADAPTER in key.split(".")]
        for key in own:
            stored = tensors.get(f"{name}.{key.replace(f'.{ADAPTER}', '')}")
            place, _, leaf = key.rpartition(".")
            owner = layer.get_submodule(place)
            expected = getattr(owner, leaf)
            if stored is None or stored.shape != expected.shape:
                found = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
                raise CorruptWeightError(f"{name}.{key} is {found}; the model needs {tuple(expected.shape)}")
            own_dtype = torch.float32 if stored.dtype == torch.float32 else dtype
            setattr(owner, leaf, nn.Parameter(stored.to(device, own_dtype), requires_grad=False))


@contextmanager
def without_adapters(model: nn.Module, conversions: Any) -> Iterator[None]:
    """The packed base alone, for saving: adapted layers are out of the module tree, and the library knows of none.

    Args:
        model: with or without adapters.
        conversions: transformers' weight conversions of the base.
    """
    layers, loaded, replaced = adapted_layers(model), adapters_loaded(model), weight_conversions(model)
    replace_modules(model, {name: layer.get_base_layer() for name, layer in layers.items()})
    set_adapters_loaded(model, False)
    set_weight_conversions(model, conversions)
    try:
        yield
    finally:
        replace_modules(model, layers)
        set_weight_conversions(model, replaced)
        set_adapters_loaded(model, loaded)


@contextmanager
def without_compensation(model: nn.Module) -> Iterator[None]:
    """The user's adapters alone, for saving: transformers refuses to save several active ones."""
    from hf_lowbit.integrations.compat.peft import active_adapters, set_active_adapters

    active = [(layer, active_adapters(layer)) for layer in adapted_layers(model).values()]
    for layer, names in active:
        set_active_adapters(layer, [name for name in names if name != ADAPTER])
    try:
        yield
    finally:
        for layer, names in active:
            set_active_adapters(layer, names)


def fold_compensation(model: nn.Module) -> None:
    """Add the compensation to the weights of a model whose packed layers have been dequantized, and remove it."""
    folded: set[int] = set()
    layers = {name: layer for name, layer in adapted_layers(model).items() if ADAPTER in getattr(layer, "r", {})}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if ADAPTER not in layer.merged_adapters and id(base.weight) not in folded:  # tied weights are one
            base.weight.data += layer.get_delta_weight(ADAPTER).to(base.weight.dtype)
            folded.add(id(base.weight))
        layer.delete_adapter(ADAPTER)
        if not layer.r:
            replace_modules(model, {name: base})
    if layers:
        remaining: dict[str, Any] = getattr(model, "peft_config", {})
        remaining.pop(ADAPTER, None)
        if not remaining:
            model.__dict__.pop("peft_config", None)
            set_adapters_loaded(model, False)


def _device(base: Any) -> Any:
    hook = getattr(base, "_hf_hook", None)
    return getattr(hook, "execution_device", None) or "cpu" if base.weight.is_meta else base.weight.device
