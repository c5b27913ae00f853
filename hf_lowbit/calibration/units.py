"""Units: the stacks of a model in the order of its calls, with how their blocks hang together."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_lowbit.calibration.calls import Calls, capture, capture_one
from hf_lowbit.calibration.chains import Flow, NotAChain, Seen, chain, probe
from hf_lowbit.calibration.parallel import share
from hf_lowbit.calibration.replay import Replay
from hf_lowbit.calibration.stacks import Stack, find_stacks, inner_blocks, loose_layers
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.nn.timestep import at_timestep
from hf_lowbit.plan import PlannedLayer

logger = logging.getLogger("hf_lowbit")

Batch = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """A stack, with how its blocks hang together.

    Attributes:
        calls: how often one forward calls it; more than once only where it is one block.
    """

    stack: Stack
    incoming: Sequence[int | None]
    flows: Sequence[Flow]
    calls: int = 1

    @property
    def is_chain(self) -> bool:
        """Whether something flows from block to block."""
        return len(self.stack.blocks) > 1

    def capture(
        self, model: nn.Module, batches: Sequence[Batch], store: TensorStore, replay: Replay | None = None
    ) -> Calls:
        """The arguments of its blocks on all batches, as the model is now; ``replay`` is of use to single blocks."""
        if self.is_chain:
            return capture(model, self.stack.blocks, batches, self.incoming, self.flows, store)
        return capture_one(model, self.stack.blocks[0], batches, self.calls, store, replay)


@dataclass(frozen=True)
class Units:
    """Where a model's layers are calibrated.

    Attributes:
        units: in the order in which the model calls them: chains of blocks; where there are none, single blocks; and
            single layers, for what no block holds.
        layer_by_layer: names of those layers.
        uncalled: planned layers that the first batch does not reach; they are in no unit.
    """

    units: list[Unit]
    layer_by_layer: list[str]
    uncalled: list[str]


def find_units(model: nn.Module, layers: Collection[str], batches: Sequence[Batch]) -> Units:
    """One real forward shows the order of the blocks and what flows between them; nothing is changed.

    Where a list of blocks is no chain, or a chain whose blocks read skip connections as a U-Net's do, the units are the
    blocks within its blocks: those that BRECQ and Q-Diffusion reconstruct (arXiv 2102.05426, 2302.04304).
    """
    homes = inner_blocks(model, layers)
    stacks = _all_stacks(model, layers)
    names = [*(block for stack in stacks for block in stack.blocks), *homes.values(), *layers]
    in_stacks = {block for stack in stacks for block in stack.blocks}
    seen = probe(model, first_sample(batches[0]), list(dict.fromkeys(names)), in_stacks)
    units: list[Unit] = []
    for stack in stacks:
        if any(_holds(unit.stack.blocks, stack.blocks[0]) for unit in units):
            continue
        try:
            units.append(_chained(stack, seen, homes))
        except NotAChain as problem:
            logger.debug("%s", problem)
    outside = loose_layers([unit.stack for unit in units], layers)
    alone = list(dict.fromkeys(homes[layer] for layer in outside if layer in homes and homes[layer] in seen))
    units += [Unit(Stack((block,)), [None], [], seen[block].calls) for block in alone]
    outside = loose_layers([unit.stack for unit in units], layers)
    outermost = [layer for layer in outside if not _holds(outside, layer)]  # a mixer comes with its layers
    single = [layer for layer in outermost if layer in seen]
    units += [Unit(Stack((layer,)), [None], [], seen[layer].calls) for layer in single]
    order = list(seen)
    units.sort(key=lambda unit: order.index(unit.stack.blocks[0]))
    return Units(units, single, loose_layers([unit.stack for unit in units], layers))


def _all_stacks(model: nn.Module, layers: Collection[str], within: str = "") -> list[Stack]:
    """Stacks, each before those within its blocks."""
    found: list[Stack] = []
    for stack in find_stacks(model, layers, within):
        inner = [each for block in stack.blocks for each in _all_stacks(model, layers, block)]
        found += [stack, *inner]
    return found


def _holds(blocks: Sequence[str], name: str) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _chained(stack: Stack, seen: Mapping[str, Seen], homes: Mapping[str, str]) -> Unit:
    """The stack as one unit.

    Raises:
        NotAChain: it is none, or better taken apart.
    """
    again = [block for block in stack.blocks if block in seen and seen[block].calls > 1]
    if again:
        raise NotAChain(f"{again[0]} is called more than once")
    unit = Unit(stack, *chain(stack.blocks, seen))
    if any(_holds(stack.blocks, home) for home in homes.values()) and _reads_skips(unit, seen):
        raise NotAChain(f"{stack.blocks[0]} reads skip connections")
    return unit


def _reads_skips(unit: Unit, seen: Mapping[str, Seen]) -> bool:
    """Whether a block reads tensors, other than what flows in, that no other block of its chain reads."""
    readers = Counter(
        id(leaf)
        for block, incoming in zip(unit.stack.blocks, unit.incoming, strict=True)
        for index, leaf in enumerate(seen[block].arguments)
        if index != incoming and isinstance(leaf, Tensor)
    )
    return any(count == 1 for count in readers.values())


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
        with at_timestep(calls.timesteps[batch]):
            output = calls.output(index, module(*args, **kwargs))
        calls.check(batch, output)
        if keys:
            store.replace(keys[batch], output)
        outputs.append(keys[batch] if keys else store.put(output))
    return outputs


def ready(model: nn.Module, batches: Sequence[Batch], device: torch.device | None = None) -> Sequence[Batch]:
    """This process' batches as :func:`without_cache` makes them, each when it is read."""
    return Prepared(model, batches, share(range(len(batches))), device)


class Prepared(Sequence[Batch]):
    """Batches that are read, and moved to a device, one at a time.

    Args:
        indices: of those that are meant.
        device: None for the model's.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], indices: Sequence[int], device: torch.device | None = None
    ) -> None:
        self._model, self._batches, self._indices, self._device = model, batches, indices, device

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Prepared: ...
    def __getitem__(self, index: int | slice) -> Batch | Prepared:
        if isinstance(index, slice):
            return Prepared(self._model, self._batches, self._indices[index], self._device)
        return without_cache(self._model, self._batches[self._indices[index]], self._device)


def without_cache(model: nn.Module, batch: Batch, device: torch.device | None = None) -> Batch:
    """The batch on a device, by default the model's, and no key-value cache: it would be kept for every block."""
    device = next(model.parameters()).device if device is None else device
    dtype = getattr(model, "dtype", None)  # of a diffusers model, which may keep its first parameters in float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def to_model(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    moved: Batch = tree_map(to_model, dict(batch))
    if isinstance(timestep := batch.get("timestep"), Tensor):  # half types do not tell all of them apart
        moved["timestep"] = timestep.to(device)
    accepted = inspect.signature(model.forward).parameters
    passes_on = any(each.kind is each.VAR_KEYWORD for each in accepted.values())  # as GraniteMoeHybrid's does
    caches = "use_cache" in accepted or (passes_on and getattr(getattr(model, "config", None), "use_cache", False))
    return {**moved, "use_cache": False} if caches else moved


def first_sample(batch: Batch) -> Batch:
    """The first sample of a batch alone. That of a denoiser, which has a timestep, stays whole: some of its tensors,
    such as Flux's positions, belong to all samples.
    """
    if "timestep" in batch:
        return batch
    return {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}


def weight_of(model: nn.Module, name: str) -> Tensor | None:
    """A layer's ``weight``, if it has one."""
    weight: Tensor | None = getattr(model.get_submodule(name), "weight", None)
    return weight
