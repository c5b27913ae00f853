"""Units: the stacks of a model in the order of its calls, with how their blocks hang together."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.calls import Calls, Flow, NotAChain, capture, chain, probe
from hf_lowbit.calibration.stacks import Stack, find_stacks, loose_layers
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.plan import PlannedLayer

logger = logging.getLogger("hf_lowbit")

Batch = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A stack, with how its blocks hang together."""

    stack: Stack
    incoming: Sequence[int | None]
    flows: Sequence[Flow]

    def capture(self, model: nn.Module, batches: Sequence[Batch], store: TensorStore) -> Calls:
        """The arguments of its blocks on all batches, as the model is now."""
        return capture(model, self.stack.blocks, batches, self.incoming, self.flows, store)


@dataclass(frozen=True)
class Units:
    """Where a model's layers are calibrated.

    Attributes:
        units: in the order in which the model calls them; layers that no chain of blocks holds are stacks of one.
        layer_by_layer: names of those layers.
        uncalled: planned layers that the first batch does not reach; they are in no unit.
    """

    units: list[Unit]
    layer_by_layer: list[str]
    uncalled: list[str]


def find_units(model: nn.Module, layers: Collection[str], batches: Sequence[Batch]) -> Units:
    """One real forward shows the order of the blocks and what flows between them; nothing is changed."""
    stacks = find_stacks(model, layers)
    names = [*(block for stack in stacks for block in stack.blocks), *layers]
    order, seen, repeated = probe(model, first_sample(batches[0]), list(dict.fromkeys(names)))
    units: list[Unit] = []
    for stack in stacks:
        try:
            if again := repeated & set(stack.blocks):
                raise NotAChain(f"{min(again)} is called more than once")
            units.append(Unit(stack, *chain(stack.blocks, seen)))
        except NotAChain as problem:
            logger.warning("%s: its layers are calibrated one by one", problem)
    outside = loose_layers([unit.stack for unit in units], layers)
    alone = [layer for layer in outside if layer in seen]
    units += [Unit(Stack((layer,)), [None], []) for layer in alone]
    units.sort(key=lambda unit: order.index(unit.stack.blocks[0]))
    return Units(units, alone, [layer for layer in outside if layer not in seen])


def tables_of(model: nn.Module, layers: Mapping[str, PlannedLayer]) -> list[str]:
    """Embeddings, and layers that share a weight with one: they are not calibrated."""
    shared = {id(weight_of(model, name)) for name, layer in layers.items() if layer.kind == "embedding"}
    return [name for name in layers if id(weight_of(model, name)) in shared]


def advance(calls: Calls, index: int, module: nn.Module, keys: list[int], store: TensorStore) -> list[int]:
    """A block's outputs on all batches, in the place of what flowed in."""
    outputs = []
    for batch in range(len(calls)):
        flowing = store.get(keys[batch]) if keys else None
        args, kwargs = calls.arguments(batch, index, flowing, torch.float32)
        output = calls.output(index, module(*args, **kwargs))
        if keys:
            store.replace(keys[batch], output)
        outputs.append(keys[batch] if keys else store.put(output))
    return outputs


def without_cache(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the model's device, and no key-value cache: it would be kept for every block."""
    device = next(model.parameters()).device
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    moved = {
        key: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    accepted = inspect.signature(model.forward).parameters
    return {**moved, "use_cache": False} if "use_cache" in accepted else moved


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch alone."""
    return {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}


def weight_of(model: nn.Module, name: str) -> Tensor | None:
    """A layer's ``weight``, if it has one."""
    weight: Tensor | None = getattr(model.get_submodule(name), "weight", None)
    return weight
