"""Compensation kept as an adapter: ``LowRankConfig(keep="adapter")`` through PEFT.

The low-rank part of the rounding error is a LoRA adapter named "lowbit" on the quantized model, and a standard PEFT
folder ``lowbit_adapter/`` beside the packed weights on disk. It belongs to the base: it stays active, and frozen, when
adapters of the user's own are added; ``model.disable_adapters()`` and ``model.delete_adapter("lowbit")`` switch it off.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.adapters import ADAPTER, inject
from hf_lowbit.integrations.origin import hub_origin
from hf_lowbit.nn import CorruptWeightError, PackedConv1d, PackedConv2d, PackedEmbedding, PackedModule
from hf_lowbit.plan import packed_modules
from hf_lowbit.state import QuantizationState

logger = logging.getLogger("hf_lowbit")

FOLDER = "lowbit_adapter"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def keeps_adapter(config: LowbitConfig) -> bool:
    """True for configs whose compensation is an adapter."""
    return config.low_rank is not None and config.low_rank.keep == "adapter"


def attach_compensation(model: nn.Module, state: QuantizationState) -> None:
    """Attach the factors that quantization left in the state, so that the model computes with them.

    Raises:
        ValueError: the model is neither transformers' nor diffusers', so that nothing would save the adapter.
    """
    if not state.adapters:
        return
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f'low_rank keep="adapter" is for transformers and diffusers models, and a {type(model).__name__} is neither: '
            'use keep="branch"'
        )
    modules = packed_modules(model)
    owners = {id(modules[name].weight): name for name in state.adapters}
    tensors: dict[str, Tensor] = {}
    targets: dict[str, int] = {}
    for name, module in modules.items():  # modules that share a packed weight share its repair
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None:
            a, b = state.adapters[owner]
            tensors.update({f"{name}.{key}": value.bfloat16() for key, value in _as_lora(module, a, b).items()})
            targets[name] = a.shape[0]
    from peft import LoraConfig

    rank = max(targets.values())
    inject(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), inference_mode=True), tensors)
    state.adapters = {}


def load_compensation(model: nn.Module, source: str | None) -> None:
    """Attach the adapter that was saved beside a packed checkpoint; where it cannot be had, warn.

    Args:
        model: reloaded, without adapters.
        source: folder or repository it was loaded from, or the folder of the client's cache with its weights.

    Raises:
        CorruptWeightError: the adapter cannot be read, or is not this model's.
    """
    folder = _find(source)
    if folder is None:
        place = source or "<folder or repository>"
        logger.warning(
            "this %s was quantized with a compensation adapter, which was not found beside its weights (%s): it computes "
            "WITHOUT it, with a larger error. Attach it with "
            'peft.PeftModel.from_pretrained(model, %r, subfolder="%s", adapter_name="%s")',
            type(model).__name__, place, place, FOLDER, ADAPTER,
        )
        return
    from peft import LoraConfig

    try:
        config, stored = LoraConfig.from_pretrained(str(folder)), load_file(folder / _WEIGHTS_FILE)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CorruptWeightError(f"the compensation adapter in {folder} cannot be read: {error}") from None
    tensors = _renamed(stored, model)
    if not tensors:
        raise CorruptWeightError(f"the compensation adapter in {folder} is another model's: no module of it is in this one")
    config.target_modules = sorted({key.partition(".lora_")[0] for key in tensors})
    config.inference_mode, config.base_model_name_or_path = True, None
    inject(model, config, tensors)


def save_compensation(model: Any, folder: Path, base: str) -> None:
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


def name_base(folder: Path, base: str) -> None:
    """Say in the adapters below a folder that their packed base is this repository, or a folder of it."""
    for path in folder.rglob(f"{FOLDER}/{_CONFIG_FILE}"):
        values = json.loads(path.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = base
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_lora(module: PackedModule, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A ``[r, columns]`` and B ``[rows, r]`` of a module's matrix in the layout of its LoRA layer."""
    if isinstance(module, PackedEmbedding):  # rows are the inputs
        return {"lora_embedding_A": b.T.contiguous(), "lora_embedding_B": a.T.contiguous()}
    if isinstance(module, PackedConv1d | PackedConv2d):
        ones = [1] * len(module.kernel_size)
        return {"lora_A.weight": module.from_matrix("weight", a), "lora_B.weight": b.reshape(*b.shape, *ones)}
    return {"lora_A.weight": a, "lora_B.weight": b}


def _renamed(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a PEFT file by the names of this model, which may lack the head of the saved one, or have another."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or ''}."
    names = set(packed_modules(model))
    tensors = {}
    for key, tensor in stored.items():
        stem, separator, rest = key.removeprefix(_PEFT_PREFIX).partition(".lora_")
        known = [name for name in (stem, stem.removeprefix(prefix), prefix + stem) if name in names]
        if known:
            tensors[f"{known[0]}{separator}{rest}"] = tensor
    return tensors


def _find(source: str | None) -> Path | None:
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


def _complete(folder: Path) -> bool:
    return (folder / _CONFIG_FILE).is_file() and (folder / _WEIGHTS_FILE).is_file()


def _smallest(value: Tensor) -> Tensor:
    """In bfloat16 where that loses nothing: always, unless the adapter was trained."""
    half = value.detach().bfloat16()
    return (half if torch.equal(half.to(value.dtype), value) else value.detach()).cpu().contiguous()
