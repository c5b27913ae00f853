"""Saving of quantized models: atomic, with report, card and adapter beside the weights.

transformers and diffusers have no hook around ``save_pretrained`` and ``push_to_hub``, so the quantized model object
carries its own versions of both; classes stay as they are.
"""

from __future__ import annotations

import functools
import logging
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowbit.integrations.adapter_files import FOLDER, save_adapter
from hf_lowbit.integrations.adapters import ADAPTER, adapter_names, without_adapters, without_compensation
from hf_lowbit.integrations.atomic import write_folder
from hf_lowbit.integrations.compat.adapters import adapters_loaded, weight_conversions
from hf_lowbit.integrations.compensation import keeps_adapter
from hf_lowbit.state import state_of

logger = logging.getLogger("hf_lowbit")

_OVERRIDDEN = ("save_pretrained", "push_to_hub", "save_lora_adapter")
_CONVERSIONS = "_lowbit_weight_conversions"  # of the base, before load_adapter could replace them


def attach_saving(model: nn.Module) -> None:
    """Give a transformers or diffusers model the product's ``save_pretrained`` and ``push_to_hub``."""
    object.__setattr__(model, _CONVERSIONS, weight_conversions(model))
    methods: dict[str, Callable[..., Any]] = {"save_pretrained": _save_pretrained, "push_to_hub": _push_to_hub}
    if hasattr(type(model), "save_lora_adapter"):
        methods["save_lora_adapter"] = _save_lora_adapter
    for name, ours in methods.items():
        object.__setattr__(model, name, types.MethodType(_like(getattr(type(model), name), ours), model))


def _like(library_method: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our method with the name and signature of the library's: pipelines pass on only what a signature names."""

    @functools.wraps(library_method)
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(model, *args, **kwargs)

    return method


def detach_saving(model: nn.Module) -> None:
    """Undo :func:`attach_saving`."""
    for name in (*_OVERRIDDEN, _CONVERSIONS):
        model.__dict__.pop(name, None)


def library_save(model: Any) -> Callable[..., None]:
    """The library's own ``save_pretrained`` of a model."""
    method: Callable[..., None] = types.MethodType(type(model).save_pretrained, model)
    return method


def _save_pretrained(model: Any, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
    """Save packed weights, config, report, model card and compensation adapter, atomically.

    Adapters of the user's own stay what they are in each library: a transformers model that has some saves the active
    one and nothing else, a diffusers model saves its base without them. See the library's ``save_pretrained`` for
    arguments.
    """
    from hf_lowbit.integrations.hub import push_to_hub as push

    names = adapter_names(model)
    if names - {ADAPTER} and _saves_adapters_only(model):
        with without_compensation(model):
            library_save(model)(save_directory, push_to_hub=push_to_hub, **kwargs)
        return
    hub_arguments = {key: kwargs.pop(key) for key in ("repo_id", "token", "private", "commit_message") if key in kwargs}
    _write_base(model, Path(save_directory), ADAPTER in names, kwargs)
    if push_to_hub:
        push(model, hub_arguments.pop("repo_id", Path(save_directory).name), **hub_arguments)


def _saves_adapters_only(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and adapters_loaded(model)


def _write_base(model: Any, target: Path, compensated: bool, arguments: dict[str, Any]) -> None:
    from hf_lowbit.integrations.hub import write_extras

    state = state_of(model)
    assert state is not None
    if keeps_adapter(state.config) and not compensated:
        logger.info("the compensation adapter has been merged or removed: the saved config does not name it")
        state.config.low_rank = None
    if arguments.get("state_dict") is not None:
        arguments["state_dict"] = _without_adapter_tensors(arguments["state_dict"])

    def write(folder: Path) -> None:
        with without_adapters(model, model.__dict__.get(_CONVERSIONS)):
            library_save(model)(folder, **arguments)
            write_extras(model, folder, kept_card=target / "README.md")
        if compensated:
            save_adapter(model, folder, base=str(target.absolute()))

    write_folder(target, write)
    if not compensated:
        shutil.rmtree(target / FOLDER, ignore_errors=True)  # of an earlier model


def _without_adapter_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if ".lora_" not in name}


def _push_to_hub(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """Upload what ``save_pretrained`` writes, in one commit. See :func:`hf_lowbit.push_to_hub`."""
    from hf_lowbit.integrations.hub import push_to_hub as push

    return push(model, repo_id, **kwargs)


def _save_lora_adapter(model: Any, *args: Any, **kwargs: Any) -> None:
    """Save an adapter of a diffusers model, which casts the whole model for that, and refuses to cast a packed one.

    Only the adapter is saved, and it is float32 unless the user cast it: nothing needs a cast.
    """
    object.__setattr__(model, "to", lambda *_, **__: model)
    try:
        type(model).save_lora_adapter(model, *args, **kwargs)
    finally:
        del model.__dict__["to"]
