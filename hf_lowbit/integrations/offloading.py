"""Models of transformers whose blocks stay in their files until they are reached.

transformers and accelerate do the reading: a model loaded with its blocks on the device "disk" has them on the meta
device, and a map from names to where the tensors lie, converted already where a checkpoint's names or shapes are not
the model's. What accelerate hooks into forwards is taken off again: the walk brings blocks itself.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.placement import BlockWeights
from hf_lowbit.calibration.stacks import find_stacks
from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations.loading import model_class_of, model_facts, read_json
from hf_lowbit.plan import build_plan
from hf_lowbit.state import shared_weights


@contextmanager
def load_without_blocks(source: str, config: LowbitConfig, beside: Path | None) -> Iterator[tuple[Any, BlockWeights]]:
    """A folder's model with its blocks on the meta device, and what reads them.

    Args:
        source: a local folder of a transformers model in safetensors files.
        config: decides which lists hold planned layers, and so are the blocks.
        beside: where tensors go that the checkpoint stores in other names or shapes than the model has; None for the
            system's folder for temporary files. They are deleted at the end.

    Raises:
        ConfigError: no such folder, or a model without blocks.
    """
    stored = read_json(source, "config.json")
    shards = sorted(Path(source).glob("*.safetensors"))
    if stored is None or "_class_name" in stored or not shards:
        raise ConfigError(f"weights='disk': {source} is no local folder of a transformers model in safetensors files")
    model_class = model_class_of(stored)
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="lowbit-offload-", dir=beside)
    try:
        blocks = _blocks(source, model_class, config)
        model = model_class.from_pretrained(
            source, dtype="auto", device_map=_device_map(source, model_class, blocks), offload_folder=folder
        )
        maps = _unhooked(model)

        def read(block: str) -> Mapping[str, Tensor]:
            prefix = f"{block}."
            own = {name[len(prefix) :]: place for name, place in maps.items() if name.startswith(prefix)}
            return {name: files[key] for name, (files, key) in own.items()}

        yield model, BlockWeights(read, _fingerprint(shards))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty(source: str, model_class: Any) -> nn.Module:
    from transformers import AutoConfig

    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model: nn.Module = make(AutoConfig.from_pretrained(source))
    return model


def _blocks(source: str, model_class: Any, config: LowbitConfig) -> list[str]:
    model = _empty(source, model_class)
    plan = build_plan(model, config, model_facts(model, shared_weights(model)))
    blocks = [block for stack in find_stacks(model, plan.layers) for block in stack.blocks]
    if not blocks:
        raise ConfigError(f"weights='disk': {source} has no list of blocks that hold planned layers")
    return blocks


def _device_map(source: str, model_class: Any, blocks: Collection[str]) -> dict[str, str]:
    """Blocks on the disk; modules with tensors of their own outside them on the CPU."""
    around = {
        name
        for name, module in _empty(source, model_class).named_modules()
        if any(True for _ in _tensors(module, recurse=False)) and not _inside(name, blocks)
    }
    return {**dict.fromkeys(sorted(around), "cpu"), **dict.fromkeys(blocks, "disk")}


def _inside(name: str, blocks: Collection[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _unhooked(model: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """Take accelerate's hooks off; full name of a tensor -> a map that reads it, and its name there."""
    from accelerate.hooks import remove_hook_from_submodules

    maps: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for name, module in model.named_modules():
        attached = getattr(module, "_hf_hook", None)
        for hook in getattr(attached, "hooks", (attached,)):
            if (files := getattr(hook, "weights_map", None)) is not None:
                prefix = f"{name}." if name else ""
                maps |= {f"{prefix}{key}": (files, key) for key, tensor in _tensors(module) if tensor.is_meta}
            if hook is not None:
                hook.offload = False  # or it would read its block while it goes
    remove_hook_from_submodules(model)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    return maps


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def _fingerprint(shards: Collection[Path]) -> str:
    """Of names, sizes and times: reading the values would take as long as quantizing some of them."""
    facts = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
