"""The folder ``lowbit_adapter/`` beside packed weights: a standard PEFT folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_lowbit.integrations.adapter_base import record_base
from hf_lowbit.integrations.adapters import ADAPTER, adapted_layers
from hf_lowbit.integrations.origin import hub_origin
from hf_lowbit.nn import CorruptWeightError

logger = logging.getLogger("hf_lowbit")

FOLDER = "lowbit_adapter"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def find_adapter(source: str | None) -> Path | None:
    """The adapter's folder, downloaded if need be; None if it is not there or cannot be had.

    Args:
        source: folder or repository of the packed weights, or the folder of the client's cache that holds them.
    """
    if not source:
        return None
    folder = Path(source) / FOLDER
    if not _complete(folder) and (origin := hub_origin(source)) is not None:
        inside = f"{origin.subfolder}/{FOLDER}" if origin.subfolder else FOLDER
        try:
            snapshot = snapshot_download(origin.repo_id, revision=origin.revision, allow_patterns=[f"{inside}/*"])
        except (OSError, ValueError) as error:  # no network, no access, no such revision
            logger.debug("%s of %s: %s", inside, origin.repo_id, error)
            return None
        folder = Path(snapshot) / inside
    return folder if _complete(folder) else None


def read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Its LoraConfig, and its tensors by their names in the model.

    Raises:
        CorruptWeightError: it cannot be read.
    """
    from peft import LoraConfig

    try:
        config, stored = LoraConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS_FILE)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CorruptWeightError(f"the compensation adapter in {folder} cannot be read: {error}") from None
    return config, {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in stored.items()}


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the adapter as a PEFT folder.

    Args:
        model: with the adapter.
        folder: of the packed weights; the adapter goes to ``lowbit_adapter/`` in it.
        base: where the packed weights will be.
    """
    from peft import get_peft_model_state_dict

    target = folder / FOLDER
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    config.save_pretrained(str(target))
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {f"{_PEFT_PREFIX}{key}": _smallest(value) for key, value in state.items()}
    save_file(tensors, target / _WEIGHTS_FILE, metadata={"format": "pt"})
    record_base(target, {name: layer.get_base_layer() for name, layer in adapted_layers(model).items()})


def name_base(folder: Path, base: str) -> None:
    """Say in the adapters below a folder that their packed base is this repository, or a folder of it."""
    for path in folder.rglob(f"{FOLDER}/{_CONFIG_FILE}"):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = base
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _complete(folder: Path) -> bool:
    return (folder / _CONFIG_FILE).is_file() and (folder / _WEIGHTS_FILE).is_file()


def _smallest(value: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing: always, unless the adapter was trained."""
    half = value.detach().bfloat16()
    return (half if torch.equal(half.to(value.dtype), value) else value.detach()).cpu().contiguous()
