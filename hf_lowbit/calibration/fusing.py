"""Layers that must be stored alike, so that kernels can run them as one."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lowbit.calibration.sites import shared_inputs
from hf_lowbit.calibration.units import Batch, first_sample, without_cache
from hf_lowbit.nn import KINDS
from hf_lowbit.plan import PlannedLayer

_ALONE = ("embedding", "experts")  # kinds that are not fused with their siblings


def tied_groups(model: nn.Module, layers: Mapping[str, PlannedLayer]) -> list[list[str]]:
    """Layers in groups that share a parameter, which is stored once; most are alone."""
    owners: dict[int, Hashable] = {}
    keys: dict[str, Hashable] = {}
    for name, layer in layers.items():
        skeleton = KINDS[layer.kind].from_float(model.get_submodule(name), layer.spec)
        parameters = [id(getattr(skeleton, key)) for key in skeleton.packed_parameters]
        keys[name] = next((owners[p] for p in parameters if p in owners), name)
        owners.update(dict.fromkeys(parameters, keys[name]))
    return _grouped(keys)


@torch.no_grad()
def fused_groups(model: nn.Module, layers: Mapping[str, PlannedLayer], batch: Batch) -> list[list[str]]:
    """Layers in groups that inference engines fuse, from one forward of one sample.

    Siblings (children of one module) that read the same input: query, key and value, gate and up. All experts of one
    list of modules. That no other layers are is a convention of theirs, such as vLLM's [ours].
    """
    sample = without_cache(model, first_sample(batch))
    keys: dict[str, Hashable] = {}
    for index, names in enumerate(shared_inputs(model, (), sample, list(layers))):
        for name in names:
            experts = _expert_list(model, name)
            if experts is not None:
                keys[name] = experts
            else:
                parent = name.rpartition(".")[0]
                keys[name] = name if layers[name].kind in _ALONE else (index, parent)
    return _grouped({name: keys[name] for name in layers})


def merged(*groupings: list[list[str]]) -> list[list[str]]:
    """The finest groups that hold every group of every grouping together, in the order of the first."""
    owner: dict[str, list[str]] = {}
    for groups in groupings:
        for group in groups:
            together: list[str] = []
            for part in {id(owner[name]): owner[name] for name in group if name in owner}.values():
                together += part
            together += [name for name in group if name not in owner]
            owner.update(dict.fromkeys(together, together))
    return list({id(group): group for group in owner.values()}.values())


def _expert_list(model: nn.Module, name: str) -> str | None:
    """The innermost list of experts that a layer belongs to."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:end])
        if re.search("expert", parts[end - 1]) and isinstance(model.get_submodule(prefix), nn.ModuleList):
            return prefix
    return None


def _grouped(keys: Mapping[str, Any]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return list(groups.values())
