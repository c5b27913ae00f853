"""Saving of quantized models: atomic, with report, card and adapter beside the weights.

transformers and diffusers have no hook around ``save_pretrained`` and ``push_to_hub``, so the quantized model object
carries its own versions of both; classes stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowbit.integrations.atomic import write_folder
from hf_lowbit.state import state_of

_OVERRIDDEN = ("save_pretrained", "push_to_hub")


def attach_saving(model: nn.Module) -> None:
    """Give a transformers or diffusers model the product's ``save_pretrained`` and ``push_to_hub``."""
    object.__setattr__(model, "save_pretrained", types.MethodType(_save_pretrained, model))
    object.__setattr__(model, "push_to_hub", types.MethodType(_push_to_hub, model))


def detach_saving(model: nn.Module) -> None:
    """Undo :func:`attach_saving`."""
    for name in _OVERRIDDEN:
        model.__dict__.pop(name, None)


def library_save(model: Any) -> Callable[..., None]:
    """The library's own ``save_pretrained`` of a model."""
    method: Callable[..., None] = types.MethodType(type(model).save_pretrained, model)
    return method


def _save_pretrained(model: Any, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
    """Save weights, config, report, model card and adapter; see the library's ``save_pretrained`` for arguments.

    The folder is written atomically. With adapters of PEFT active on the model, the base is saved in full (packed)
    and the active adapter beside it.
    """
    from hf_lowbit.integrations.hub import push_to_hub as push
    from hf_lowbit.integrations.hub import write_extras

    def write(folder: Path) -> None:
        library_save(model)(folder, **save_arguments)
        write_extras(model, folder, kept_card=Path(save_directory) / "README.md")

    hub_arguments = {key: kwargs.pop(key) for key in ("repo_id", "token", "private", "commit_message") if key in kwargs}
    save_arguments = kwargs
    assert state_of(model) is not None
    write_folder(save_directory, write)
    if push_to_hub:
        push(model, hub_arguments.pop("repo_id", Path(save_directory).name), **hub_arguments)


def _push_to_hub(model: Any, repo_id: str, **kwargs: Any) -> Any:
    """Upload what ``save_pretrained`` writes, in one commit. See :func:`hf_lowbit.push_to_hub`."""
    from hf_lowbit.integrations.hub import push_to_hub as push

    return push(model, repo_id, **kwargs)
