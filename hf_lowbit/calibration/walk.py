"""The walk: block by block over a model, each calibrated on what the quantized blocks before it produce."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.autocast import autocast
from hf_lowbit.calibration.block import Block, Pack, PackedParameter
from hf_lowbit.calibration.calls import Calls
from hf_lowbit.calibration.checkpoint import Checkpoint
from hf_lowbit.calibration.fitting import FitInputs
from hf_lowbit.calibration.heap import hand_back_memory
from hf_lowbit.calibration.low_rank import UNCOMPENSATED, Compensation, Rounding
from hf_lowbit.calibration.parallel import agree, rank, wait_for_all
from hf_lowbit.calibration.placement import Placement
from hf_lowbit.calibration.progress import Progress
from hf_lowbit.calibration.replay import Replay
from hf_lowbit.calibration.stacks import layers_of
from hf_lowbit.calibration.static_inputs import check_timesteps, set_static_inputs, with_dynamic_inputs
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.calibration.units import Unit, advance, find_units, ready, tables_of, weight_of
from hf_lowbit.formats import PackedTensor
from hf_lowbit.nn import KINDS, LayerSpec, PackedModule
from hf_lowbit.nn.timestep import attach_timestep, detach_timestep
from hf_lowbit.plan import PlannedLayer, packed_modules, replace_module
from hf_lowbit.rounding.completing import round_completely

logger = logging.getLogger("hf_lowbit")

Step = Callable[[Block], None]
_FEW = 8


@dataclass
class Walked:
    """What the walk did.

    Attributes:
        parameters: full parameter name -> its error and adapter.
        notes: full matrix name -> why it was not quantized as the method would have it.
        layer_by_layer: planned layers outside every chain of blocks.
    """

    parameters: dict[str, PackedParameter] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    layer_by_layer: list[str] = field(default_factory=list)


class Walk:
    """One calibrated quantization of a model, in place.

    Args:
        model: float, in evaluation mode, on one device; with a placement that has weights, blocks on the meta device.
        layers: name -> planned layer.
        step: what a method does with a block; matrices that it leaves are rounded to nearest, and noted.
        batches: keyword arguments of the model's forward.
        pack: turns a matrix' codes into the packed parameter of its module.
        targets: keep what the float model's blocks return, for :meth:`Block.target`.
        checkpoint: where finished blocks are kept; None to keep none.
        seed: handed to blocks.
        limit: bytes of activations kept in memory; None for no limit.
        folder: where the rest goes; None for the system's folder for temporary files.
        compensation: low-rank, of every layer.
        rounding: of a method that rounds each matrix by itself, for layers that no data reaches; by default to nearest.
        percentile: of |input| that stored scales of inputs cover.
        fit_inputs: finds these scales in another way.
        original: a float copy of the model, where there is one already.
        placement: where blocks are computed; None for where the model is.
        mixed_precision: blocks compute in bfloat16 where that is faster (:mod:`hf_lowbit.calibration.autocast`).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, PlannedLayer],
        step: Step,
        batches: Sequence[dict[str, Any]],
        pack: Pack,
        *,
        targets: bool = False,
        checkpoint: Checkpoint | None = None,
        seed: int = 0,
        limit: int | None = None,
        folder: Path | None = None,
        compensation: Compensation = UNCOMPENSATED,
        rounding: Rounding | None = None,
        percentile: float = 100.0,
        fit_inputs: FitInputs | None = None,
        original: nn.Module | None = None,
        placement: Placement | None = None,
        mixed_precision: bool = False,
    ) -> None:
        self.model, self.layers, self.step, self.pack = model, dict(layers), step, pack
        self.percentile, self.fit_inputs, self.original = percentile, fit_inputs, original
        self.placement = Placement(model, layers) if placement is None else placement
        self.batches = ready(model, batches, self.placement.device)
        self.targets, self.checkpoint, self.seed, self.limit, self.folder = targets, checkpoint, seed, limit, folder
        self.compensation, self.rounding, self.mixed_precision = compensation, rounding, mixed_precision
        self.walked = Walked()

    @torch.no_grad()
    def run(self) -> Walked:
        """Quantize everything that is planned."""
        if not check_timesteps(self.model, self.layers.values(), self.batches):
            return self._run()
        attach_timestep(self.model, always=True)  # what is quantized first is called while the rest is not
        try:
            return self._run()
        except BaseException:
            detach_timestep(self.model)
            raise

    def _run(self) -> Walked:
        tables = {name: self.layers.pop(name) for name in tables_of(self.model, self.layers)}
        units = self._units()
        progress = Progress(sum(len(unit.stack.blocks) for unit in units))
        with self.placement.store(self.limit, self.folder) as store:
            original = self._original(units)
            early = [unit if self.targets and (original is None or unit.is_chain) else None for unit in units]
            floats = [self._capture(unit, self.model, store) if unit is not None else None for unit in early]
            self._round_tables(tables)
            share = self.placement.replay_limit(self.limit)
            replays = {model: Replay(model, share) for model in (self.model, original) if model is not None}
            for unit, calls in zip(units, floats, strict=True):
                self._walk(unit, calls, original, store, progress, replays)
            if store.spilled:
                logger.info("%d MB of activations were spilled to disk", store.spilled >> 20)
        return self.walked

    def _capture(self, unit: Unit, model: nn.Module, store: TensorStore, replay: Replay | None = None) -> Calls:
        with self.placement.computing(model):
            return unit.capture(model, self.batches, store, replay)

    def _original(self, units: Sequence[Unit]) -> nn.Module | None:
        """A copy of the float model, where targets of many single blocks are wanted: all that they read in it would be
        too much to keep from the start, as a chain's one input is kept.
        """
        if not self.targets or sum(not unit.is_chain for unit in units) <= _FEW:
            return None
        return copy.deepcopy(self.model) if self.original is None else self.original

    def _round_tables(self, tables: Mapping[str, PlannedLayer]) -> None:
        """They come first: what follows sees them as they will be."""
        owners: dict[int, nn.Module] = {}
        for name, layer in tables.items():
            weight = weight_of(self.model, name)
            if id(weight) not in owners:
                owners[id(weight)] = self._round(name, layer, "an embedding, or tied to one")
                continue
            module = KINDS[layer.kind].from_float(self.model.get_submodule(name), layer.spec)
            for key in module.companion_shapes("weight"):
                setattr(module, key, getattr(owners[id(weight)], key))
            replace_module(self.model, name, module)

    def _round(self, name: str, layer: PlannedLayer, reason: str) -> nn.Module:
        """Round a layer without calibration."""
        spec, original = with_dynamic_inputs(layer.spec), self.model.get_submodule(name)
        consequences = [] if self.rounding is not None else ["rounded to nearest"]
        if spec != layer.spec:
            consequences.append("its inputs take dynamic scales" if spec.mixer is None else "it computes in floats")
        if self.compensation.metric != "identity" and self.compensation.ranks.get(name):
            consequences.append("its low-rank part takes metric='identity'")
        with self.placement.at_hand(name, original) as becomes:
            module = KINDS[layer.kind].from_float(original, spec)
            for parameter in module.packed_parameters:
                weight = getattr(module, parameter)
                packed = self._rounded(module, parameter, module.to_matrix(parameter, weight), name)
                self.walked.parameters[f"{name}.{parameter}"] = self.pack(module, parameter, weight, packed, name)
                if consequences:
                    self.walked.notes[f"{name}.{parameter}"] = f"{reason}: {', '.join(consequences)}"
            becomes(module)
        replace_module(self.model, name, module)
        return module

    def _rounded(self, module: PackedModule, parameter: str, matrix: Tensor, name: str) -> PackedTensor:
        spec = module.layer_spec.weight
        if self.rounding is None:
            return round_completely(matrix, spec)
        return self.rounding(self.compensation.target(matrix, module, parameter, name, self.rounding, None), spec)

    def _units(self) -> list[Unit]:
        """The units; layers that the data does not reach are rounded at once."""
        with self.placement.computing(self.model):
            found = find_units(self.model, self.layers, self.batches)
        self.walked.layer_by_layer += found.layer_by_layer
        for layer in found.uncalled:
            self._round(layer, self.layers.pop(layer), "not called on the calibration data")
        if self.walked.layer_by_layer:
            logger.info("outside chains of blocks, calibrated one by one: %s", ", ".join(self.walked.layer_by_layer))
        return found.units

    def _walk(
        self,
        unit: Unit,
        floats: Calls | None,
        original: nn.Module | None,
        store: TensorStore,
        progress: Progress,
        replays: Mapping[nn.Module, Replay],
    ) -> None:
        finished = None if unit.is_chain else self._finished(unit.stack.blocks[0])
        if finished is not None:
            calls, floats = Calls(store, [None], []), None  # nobody will read them
        else:
            calls = self._capture(unit, self.model, store, replays[self.model])
            if floats is None and original is not None:
                floats = self._capture(unit, original, store, replays[original])
        inputs, targets = calls.inputs, list(floats.inputs) if floats is not None else []
        for index, name in enumerate(unit.stack.blocks):
            last = index == len(unit.stack.blocks) - 1
            module = self.model.get_submodule(name)
            with self.placement.at_hand(name, module) as becomes:
                kept = {key: tensor.dtype for key, tensor in _floats(module)}
                kept |= {f"{key[:-6]}output_dtype": dtype for key, dtype in kept.items() if key.endswith("weight")}
                module.float()
                if floats is not None:
                    targets = self._advance(floats, index, module, targets, store)
                layers = {
                    layer[len(name) + 1 :]: self.layers[layer] for layer in layers_of(name, self.layers)
                }  # "" is the block itself
                block = Block(
                    name, module, layers, calls, index, store, inputs, targets, self.pack, self.seed,
                    self.compensation, self.mixed_precision,
                )  # fmt: skip
                restored = self._finished(name) if finished is None else finished
                wait_for_all()  # before any process can have written this block
                if restored is None:
                    self._quantize(block, _broken(calls, floats))
                else:
                    self._restore(block, *restored)
                if block.module is not module:
                    replace_module(self.model, name, block.module)
                _round_trip(block.module, kept)
                if not last:
                    inputs = self._advance(calls, index, block.module, inputs, store)
                _restore_types(block.module, kept)
                becomes(block.module)
            self._account(block, restored is not None)
            hand_back_memory()  # what the block took, or the next one lands beside its holes
            progress.step(name, restored is not None)
        for key in (*inputs, *targets):
            store.drop(key)
        for captured in (calls, floats):
            if captured is not None:
                captured.forget()
        if not unit.is_chain:
            for replay in replays.values():
                replay.finish(unit.stack.blocks[0])

    def _advance(self, calls: Calls, index: int, module: nn.Module, keys: list[int], store: TensorStore) -> list[int]:
        with autocast(self.placement.device, self.mixed_precision):
            return advance(calls, index, module, keys, store)

    def _finished(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What an earlier run made of a block."""
        return self.checkpoint.load(block) if self.checkpoint is not None else None

    def _quantize(self, block: Block, broken: str | None) -> None:
        if broken is None:
            self.step(block)
        else:
            logger.warning("%s: %s", block.name, broken)
            block.notes.update(dict.fromkeys(block.unpacked, f"{broken}: rounded to nearest"))
        for key in block.unpacked:
            block.round_to_nearest(key, block.notes.get(key, "the method left it: rounded to nearest"))
        set_static_inputs(block, self.percentile, self.fit_inputs)
        for tensor in block.module.state_dict().values():
            agree(tensor)

    def _account(self, block: Block, restored: bool) -> None:
        notes = {f"{block.name}.{key}" if key else block.name: why for key, why in block.notes.items()}
        self.walked.parameters.update(block.done)
        self.walked.notes.update(notes)
        if self.checkpoint is None or restored or rank() != 0:
            return
        tensors = dict(block.module.state_dict())
        specs = {name: module.layer_spec.to_dict() for name, module in packed_modules(block.module).items()}
        for parameter, done in block.done.items():
            if done.adapter is not None:
                tensors |= {f"adapter:{parameter}:{part}": t for part, t in zip("ab", done.adapter, strict=True)}
        errors = {parameter: done.error for parameter, done in block.done.items()}
        self.checkpoint.save(block.name, tensors, {"specs": specs, "errors": errors, "notes": block.notes})

    def _restore(self, block: Block, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take a block from an earlier run."""
        block.matrices.clear()  # or its float weights stay until cycles are collected
        for name, values in facts["specs"].items():
            layer = self.layers[".".join(part for part in (block.name, name) if part)]
            module = KINDS[layer.kind].from_float(block.module.get_submodule(name), LayerSpec.from_dict(values))
            for parameter in module.packed_parameters:
                module.allocate(parameter, packed=True)
            if name:
                replace_module(block.module, name, module)
            else:
                block.module = module
        adapters = {name: tensors.pop(name) for name in list(tensors) if name.startswith("adapter:")}
        block.module.load_state_dict({name: tensor.to(block.device) for name, tensor in tensors.items()})
        block.notes = facts["notes"]
        for parameter, error in facts["errors"].items():
            a, b = adapters.get(f"adapter:{parameter}:a"), adapters.get(f"adapter:{parameter}:b")
            block.done[parameter] = PackedParameter(error, None if a is None or b is None else (a, b))


def _broken(calls: Calls, floats: Calls | None) -> str | None:
    """Why a block cannot be calibrated on what it reads, or has to return."""
    for captured, who in ((floats, "the float model's"), (calls, "the quantized model's")):
        if captured is not None and captured.broken is not None:
            timestep = captured.timesteps[captured.broken]
            when = "" if timestep is None else f", at timestep {float(torch.as_tensor(timestep).flatten()[0]):g}"
            return f"{who} activations are not finite in batch {captured.broken} of the calibration data{when}"
    return None


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]


def _round_trip(module: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Floats that stay floats take the values they will have in the model's own type."""
    for name, tensor in _floats(module):
        if name in types:
            tensor.data = tensor.data.to(types[name]).float()


def _restore_types(module: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    for name, tensor in _floats(module):
        if name in types:
            tensor.data = tensor.data.to(types[name])
