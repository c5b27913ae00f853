"""Where the channels of a block's inputs are reassembled, and the search for the best threshold (QLLM, 2310.08041)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.inspected import OutputError, captured_calls, common_owner
from hf_lowbit.calibration.parallel import combine, processes
from hf_lowbit.calibration.scaling import first_sequence
from hf_lowbit.calibration.sites import shared_inputs
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import decode
from hf_lowbit.nn import PackedLinear, Reassembly
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.training.straight_through import simulate_activation
from hf_lowbit.transforms.reassembly import Assignment, ReassemblyError, assign, candidates, pair_errors

logger = logging.getLogger("hf_lowbit")


class Similarity(Hessian):
    """Mean of X^T X, and the largest |x| of every channel."""

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        super().__init__(channels, device)
        self.maximum = torch.zeros(channels, device=device)

    def update(self, x: Tensor) -> None:
        super().update(x)
        if len(x):
            self.maximum = torch.maximum(self.maximum, x.abs().amax(0))

    def largest(self) -> list[Tensor]:
        return [self.maximum]


def linear_layers(block: Block) -> dict[str, PackedLinear]:
    """Name in the block -> packed layer to be, its parameters still the float layer's; other kinds are left out."""
    layers = {matrix.layer: matrix.skeleton for matrix in block.matrices.values()}
    return {name: layer for name, layer in layers.items() if isinstance(layer, PackedLinear)}


@torch.no_grad()
def reassembly_sites(block: Block) -> list[tuple[str, ...]]:
    """Linear layers with quantized inputs, those together that read the same input.

    Left out are layers behind attention, as in the paper: behind anything that mixes tokens [ours]. They are found by
    trying: the layers called before them return something else for the first token, and other tokens' inputs change.
    """
    layers = linear_layers(block)
    call = first_sequence(block)
    groups = shared_inputs(block.module, *call, layers)
    found = []
    for before, group in zip([(), *groups], groups, strict=False):
        names = tuple(name for name in group if layers[name].layer_spec.activation is not None)
        if names and not _mixes_tokens(block, before, names[0], call):
            found.append(names)
    if processes() > 1:  # what the first one's data show goes for all
        sent = [found]
        dist.broadcast_object_list(sent, 0)
        found = sent[0]
    return found


def _mixes_tokens(block: Block, before: tuple[str, ...], layer: str, call: tuple[Any, Any]) -> bool:
    """Whether what ``before`` returns for the first token reaches the inputs of other tokens at ``layer``."""
    read: list[Tensor] = []
    changed = False

    def change(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not changed:
            return None
        other = output.clone(memory_format=torch.contiguous_format)
        other.view(-1, other.shape[-1])[0].neg_().add_(1)
        return other

    with ExitStack() as stack:
        reader = block.module.get_submodule(layer)
        stack.callback(reader.register_forward_pre_hook(lambda m, args: read.append(args[0].clone())).remove)
        for name in before:
            stack.callback(block.module.get_submodule(name).register_forward_hook(change).remove)
        for changed in (False, True):  # noqa: B007  read by the hook
            block.module(*call[0], **call[1])
    if len(read) < 2:  # not called on this data
        return True
    one, other = (x.reshape(-1, x.shape[-1])[1:] for x in (read[0], read[len(read) // 2]))
    return one.shape != other.shape or not torch.equal(one, other)


@torch.no_grad()
def search_reassembly(
    block: Block, site: tuple[str, ...], statistic: Similarity, ratio: float, most: int, batches: int = 4
) -> Tensor:
    """Give the layers of a site the reassembly of least error, or none where no split beats that.

    The error is that of the smallest module that holds all of them (the attention, the MLP, or the layer itself) with
    rounded weights and quantized inputs: what the packed layers will compute.

    Args:
        site: of :func:`reassembly_sites`.
        ratio: channels that splitting may add, at most, relative to all.
        most: splits that are tried, at most.
        batches: of the data (of each process), that errors are measured on.

    Returns:
        The squared error of every trial, float64; the first one splits nothing.

    Raises:
        ReassemblyError: inputs that are NaN or infinite.
    """
    layers = {name: layer for name, layer in linear_layers(block).items() if name in site}
    module = block.module.get_submodule(common_owner(block.module, site))
    trials: list[Assignment | None] = [None, *_assignments(layers, statistic, ratio, most)]
    errors = OutputError(module, captured_calls(block, module, min(batches, len(block))), len(trials))
    for trial, assignment in enumerate(trials):
        set_reassembly(layers, assignment)
        with as_deployed(block, layers):
            errors.measure(trial)
    combine([errors])
    best = int(errors.errors.argmin())
    set_reassembly(layers, trials[best])
    gain = float(errors.errors[best] / errors.errors[0]) if float(errors.errors[0]) else 1.0
    logger.debug("%s, %s: reassembly leaves %.3f of the error", block.name, ", ".join(site), gain)
    return errors.errors


def _assignments(
    layers: Mapping[str, PackedLinear], statistic: Similarity, ratio: float, most: int
) -> list[Assignment]:
    weights = [layer.to_matrix("weight", layer.weight.detach()).float() for layer in layers.values()]
    errors = pair_errors(statistic.matrix, torch.stack([weight.t() @ weight for weight in weights]).sum(0))
    found = []
    for counts in candidates(statistic.maximum, ratio, most):
        try:
            found.append(assign(counts, errors))
        except ReassemblyError:  # later ones split still more
            break
    return found


def set_reassembly(layers: Mapping[str, PackedLinear], assignment: Assignment | None) -> None:
    """Layers that are not packed yet read their input so from now on; None: as it comes."""
    for layer in layers.values():
        if assignment is None:
            layer.set_transform(None)
            continue
        factor = assignment.factor.view(torch.int32)
        tensors = {"source": assignment.source, "target": assignment.target, "factor": factor}
        layer.set_transform(Reassembly(len(factor)), tensors)


@contextmanager
def as_deployed(block: Block, layers: Mapping[str, PackedLinear]) -> Iterator[None]:
    """The block's float layers compute what their packed ones will, rounded to nearest, until the context ends."""
    originals = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for layer in layers.values():
            matrix = layer.to_matrix("weight", layer.weight.detach())
            # the float layer's parameter is the same object
            layer.weight.data = layer.arranged(decode(round_to_nearest(matrix, layer.layer_spec.weight)))
        with quantized_inputs(block, layers):
            yield
    finally:
        for name, original in originals.items():
            layers[name].weight.data = original


@contextmanager
def quantized_inputs(block: Block, layers: Mapping[str, PackedLinear]) -> Iterator[None]:
    """The block's float layers read their inputs transformed and quantized; gradients pass straight through."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = lambda m, args, layer=layer: (_read(layer, args[0]), *args[1:])  # noqa: E731
            stack.callback(block.module.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


def _read(layer: PackedLinear, x: Tensor) -> Tensor:
    x, activation = layer.transformed(x), layer.layer_spec.activation
    return x if activation is None else simulate_activation(x, activation)
