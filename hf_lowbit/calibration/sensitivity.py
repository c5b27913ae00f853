"""How much each layer loses at each candidate, measured block by block on a model that stays as it is.

Blocks run in float, on the inputs that the float blocks before them produce: the loss of one layer does not depend on
what the others become. The losses of candidates with a low-rank branch are those that its factors leave.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix, matrices_of
from hf_lowbit.calibration.progress import Progress
from hf_lowbit.calibration.stacks import layers_of
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.calibration.substitution import Rounding, rounded, substituted
from hf_lowbit.calibration.units import Batch, Unit, advance, find_units, tables_of, without_cache
from hf_lowbit.compensation import remaining_errors
from hf_lowbit.nn import LayerSpec
from hf_lowbit.plan import PlannedLayer
from hf_lowbit.rounding import round_to_nearest

logger = logging.getLogger("hf_lowbit")

Candidates = Mapping[str, Sequence[PlannedLayer]]
_PROBES = 2  # batches on which blocks run with one layer rounded
_SMALL = 1e-3  # tokens below this share of the median power count as if they had it


@dataclass
class Sensitivity:
    """What was measured.

    Attributes:
        losses: layer -> the loss of each of its candidates.
        notes: layer -> why its loss could not be measured on its inputs.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


Measure = Callable[[Block, Candidates, Rounding, str], dict[str, list[float]]]


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    candidates: Candidates,
    batches: Sequence[Batch],
    measure: Measure,
    rounding: Rounding = round_to_nearest,
    limit: int | None = None,
    low_rank: str = "full",
) -> Sensitivity:
    """The losses of every layer's candidates. The model is only read: blocks are worked on in float32 copies.

    Layers without inputs to measure on (embeddings and what is tied to them, convolutions of several groups, layers
    or experts that no token reaches) count with the relative error of their weights, ||W - Q||^2 / ||W||^2: what the
    relative error of their output would be if their inputs were white [ours].

    Args:
        model: float, in evaluation mode, on one device.
        candidates: layer -> what it may become.
        batches: keyword arguments of the model's forward.
        measure: :func:`output_losses` or :func:`block_losses`.
        rounding: matrix and spec -> packed tensor.
        limit: bytes of activations kept in memory; None for no limit.
        low_rank: the metric of low-rank factors, of :data:`hf_lowbit.compensation.METRICS`.

    Raises:
        RoundingError: a weight that cannot be rounded.
    """
    batches = [without_cache(model, batch) for batch in batches]
    first = {name: options[0] for name, options in candidates.items()}
    tables = tables_of(model, first)
    found = find_units(model, [name for name in candidates if name not in tables], batches)
    result = Sensitivity()
    for names, reason in ((tables, "an embedding, or tied to one"), (found.uncalled, "not called on the data")):
        for name in names:
            result.losses[name] = weight_losses(name, model.get_submodule(name), candidates[name], rounding)
            result.notes[name] = reason
    progress = Progress(sum(len(unit.stack.blocks) for unit in found.units))
    with TensorStore(limit) as store:
        for unit in found.units:
            _measure_unit(model, unit, candidates, batches, measure, rounding, low_rank, store, progress, result)
    return result


def _measure_unit(
    model: nn.Module,
    unit: Unit,
    candidates: Candidates,
    batches: Sequence[Batch],
    measure: Measure,
    rounding: Rounding,
    low_rank: str,
    store: TensorStore,
    progress: Progress,
    result: Sensitivity,
) -> None:
    calls = unit.capture(model, batches, store)
    inputs = calls.inputs
    for index, name in enumerate(unit.stack.blocks):
        module = copy.deepcopy(model.get_submodule(name)).float()
        own = {layer[len(name) + 1 :]: candidates[layer] for layer in layers_of(name, candidates)}
        first = {layer: options[0] for layer, options in own.items()}
        block = Block(name, module, first, calls, index, store, inputs, [], _refuse_to_pack)
        losses = measure(block, own, rounding, low_rank)
        for layer in own:
            full = ".".join(part for part in (name, layer) if part)
            if layer in losses:
                result.losses[full] = losses[layer]
            else:
                result.losses[full] = weight_losses(full, module.get_submodule(layer), own[layer], rounding)
                result.notes[full] = "nothing that it reads can be measured"
        if index < len(unit.stack.blocks) - 1:
            inputs = advance(calls, index, module, inputs, store)
        progress.step(name, False)
    for key in inputs:
        store.drop(key)
    calls.forget()


def output_losses(
    block: Block, candidates: Candidates, rounding: Rounding, low_rank: str = "full"
) -> dict[str, list[float]]:
    """Metric "output": mean squared error of a layer's own output when it alone is rounded.

    ||(W - Q) x||^2 over outputs and tokens, from H = mean x x^T: tr((W - Q) H (W - Q)^T) / rows, which is what
    layer-wise methods minimise (AdaRound, arXiv 2004.10568; GPTQ, arXiv 2210.17323). Of experts, the mean over tokens.
    """
    errors = _output_errors(block, candidates, rounding, low_rank)
    return {layer: [error / found.entries for error in found.left] for layer, found in errors.items()}


def block_losses(
    block: Block, candidates: Candidates, rounding: Rounding, low_rank: str = "full"
) -> dict[str, list[float]]:
    """Metric "hessian": the second-order loss of every layer in units of what it does to its block's output.

    tr((W - Q) H (W - Q)^T) is the loss that OBQ and GPTQ (arXiv 2210.17323) minimise, the layer-wise Hessian in the
    place of the network's, which HAWQ-V2 (arXiv 1911.03852) weighs ||W - Q||^2 by the mean trace of. Layers cannot be
    compared by it: an error of a query counts less than one of what is added to the residual stream, and streams grow
    from block to block. So each layer is weighed, without a gradient [ours]: the block runs with that layer alone
    rounded to its middle candidate, unrepaired, and the relative error of the block's output, mean over tokens of
    ||y - y'||^2 / ||y||^2, is what the trace of that candidate stands for; the other candidates' traces are
    converted at the same rate. Every token counts alike, so that the few huge ones of language models do not decide.
    """
    references = [block.run(batch) for batch in range(min(_PROBES, len(block)))]
    losses: dict[str, list[float]] = {}
    for layer, (errors, left, _) in _output_errors(block, candidates, rounding, low_rank).items():
        middle = len(errors) // 2
        if not errors[middle]:
            middle = max(range(len(errors)), key=errors.__getitem__)
        if not errors[middle]:
            losses[layer] = errors
            continue
        with substituted(block.module, {layer: candidates[layer][middle]}, rounding):
            damage = [
                relative_damage(reference, block.run(batch), _channel_dim(block))
                for batch, reference in enumerate(references)
            ]
        rate = sum(damage) / len(damage) / errors[middle]
        losses[layer] = [rate * error for error in left]
    return losses


def relative_damage(reference: Tensor, output: Tensor, channels: int = -1) -> float:
    """Mean over tokens of ||y - y'||^2 / ||y||^2; tokens that are nearly zero are compared with the median one.

    Args:
        reference, output: float, of one shape.
        channels: the dimension of the channels; every place in the others is a token.
    """
    power, error = ((x.float().square().sum(channels)) for x in (reference, output - reference))
    floor = (_SMALL * power.median()).clamp(min=torch.finfo(torch.float32).tiny)
    return (error / power.clamp(min=floor)).mean().item()


def weight_losses(name: str, layer: nn.Module, options: Sequence[PlannedLayer], rounding: Rounding) -> list[float]:
    """Relative squared error of a layer's weights at each candidate."""
    losses = [0.0] * len(options)
    norm = 0.0
    for index, matrix in enumerate(matrices_of("", layer, options[0].kind, options[0].spec)):
        specs = [matrices_of("", layer, option.kind, option.spec)[index].layer_spec for option in options]
        changes = _changes(matrix, specs, rounding, f"{name}.{matrix.key}", "identity", None)
        losses = [loss + left for loss, (_, left) in zip(losses, changes, strict=True)]
        norm += matrix.weight.float().square().sum().item()
    return [loss / norm if norm else 0.0 for loss in losses]


class _Errors(NamedTuple):
    """Squared errors of a layer's output summed over all data, per candidate, and how many values that sums over."""

    rounded: list[float]
    left: list[float]  # with the low-rank branch
    entries: float


def _output_errors(block: Block, candidates: Candidates, rounding: Rounding, low_rank: str) -> dict[str, _Errors]:
    """Of every layer that a token reaches."""
    hessians = {key: hessian for key, hessian in block.hessians().items() if hessian.tokens}
    result: dict[str, _Errors] = {}
    known: tuple[Hessian | None, Tensor] = None, torch.empty(0)  # siblings read the same
    for layer, options in candidates.items():
        keys = [key for key, matrix in block.matrices.items() if matrix.layer == layer and key in hessians]
        if not keys:
            continue
        specs = [option.spec for option in options]
        errors = _Errors([0.0] * len(options), [0.0] * len(options), 0.0)
        for key in keys:
            hessian, matrix = hessians[key], block.matrices[key]
            if known[0] is not hessian:
                known = hessian, hessian.matrix
            changes = _changes(matrix, specs, rounding, f"{block.name}.{key}", low_rank, known[1])
            for index, (before, after) in enumerate(changes):
                errors.rounded[index] += before * hessian.tokens
                errors.left[index] += after * hessian.tokens
        count = sum(hessians[key].tokens * block.matrices[key].weight.shape[0] for key in keys)
        result[layer] = errors._replace(entries=float(count))
    return result


def _changes(
    matrix: Matrix, specs: Sequence[LayerSpec], rounding: Rounding, where: str, low_rank: str, moment: Tensor | None
) -> list[tuple[float, float]]:
    """The squared error that each specification makes in what a matrix computes, and what its low-rank branch leaves.

    Args:
        moment: mean of x x^T; None counts the error of the weights.
    """
    weight, branches = matrix.weight.float(), matrix.skeleton.branches(matrix.parameter)
    found: dict[LayerSpec, tuple[float, float]] = {}
    for spec in dict.fromkeys(spec.weight for spec in specs):
        own = list(dict.fromkeys(other for other in specs if other.weight == spec))
        change = weight - rounded(weight, spec, rounding, where)
        ranks = [0, *(other.low_rank for other in own)]
        before, *after = remaining_errors(change, ranks, low_rank, moment, branches)
        found |= {other: (before, left) for other, left in zip(own, after, strict=True)}
    return [found[spec] for spec in specs]


def _channel_dim(block: Block) -> int:
    """Where the channels of the block's output are."""
    alone = block.matrices.get("weight")
    return 1 if alone is not None and alone.layer == "" and alone.skeleton.kind in ("conv1d", "conv2d") else -1


def _refuse_to_pack(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("sensitivity is measured on float blocks: nothing is packed")
