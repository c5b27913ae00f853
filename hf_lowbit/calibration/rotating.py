"""Rotating the residual stream of a float model, exactly (QuaRot, arXiv 2404.00456, stage 1a).

The gains of the stream's norms go into the layers that read them; every writer's outputs and every reader's inputs are
rotated by the same Q. What that needs is found by trying (:mod:`hf_lowbit.calibration.stream`), and the result counts
only if the model returns what it did before, in float32 [ours].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from hf_lowbit.calibration.gains import commutes, fold_gain, in_float64
from hf_lowbit.calibration.heap import hand_back_memory, hand_back_pages
from hf_lowbit.calibration.snapshot import remember
from hf_lowbit.calibration.stream import Stream, StreamError, find_stream
from hf_lowbit.calibration.units import Batch, first_sample, without_cache
from hf_lowbit.transforms.fold import input_weights, output_weights
from hf_lowbit.transforms.rotation import Rotation, mean_preserving, random_hadamard

_TOKENS = 32  # of the trial
_TOLERANCE = 5e-4  # of the model's output in float32
_LARGE = 1 << 22  # elements


Prepare = Callable[[nn.Module, Sequence[Batch]], list[str]]


@dataclass(frozen=True)
class Rotated:
    """What became of a model.

    Attributes:
        notes: what was done, or why the model was left exactly as it was: lines for its report.
        readers: names of the layers whose inputs are rotated now.
    """

    notes: list[str]
    readers: frozenset[str] = frozenset()


def rotating(rotate: bool, seed: int) -> Prepare | None:
    """What a recipe prepares: :func:`rotate_stream`, or nothing."""
    return (lambda model, batches: rotate_stream(model, batches, seed).notes) if rotate else None


@torch.no_grad()
def rotate_stream(model: nn.Module, batches: Sequence[Batch], seed: int = 0) -> Rotated:
    """Rotate the residual stream of a float model by a random Hadamard matrix, in place.

    Models with LayerNorm get a random rotation that leaves the mean alone instead: LayerNorm commutes with it [ours].
    A head that is tied to the embedding gets a weight of its own: their rotated weights differ.

    Everything is computed in float64 and stored in the model's own types; the trial runs in float32.

    Args:
        model: float, in evaluation mode.
        batches: keyword arguments of its forward; the first sample is tried.
        seed: of Q.
    """
    undo = remember(model)
    types = {tensor: tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    try:
        _promote(types)
        batch = _few_tokens(without_cache(model, first_sample(batches[0])))
        expected = _outputs(model, batch)
        stream = find_stream(model, batch)
        undo()  # matrices are promoted as they are rotated: no copy of all of them beside
        hand_back_memory()
        _promote(tensor for tensor in types if tensor.dim() < 2)
        untied = _untie(model, stream)
        types |= {model.get_submodule(name).get_parameter("weight"): types[weight] for name, weight in untied.items()}
        _rotate(model, stream, seed)
        _promote(types)
        hand_back_memory()
        error = _difference(_outputs(model, batch), expected)
        if not error <= _TOLERANCE:
            raise StreamError(f"the rotated model's output is not the same: it differs by {error:.2g}")
    except StreamError as reason:
        undo()
        return Rotated([f"the residual stream is not rotated: {reason}"])
    except BaseException:
        undo()
        raise
    for tensor, dtype in sorted(types.items(), key=lambda item: item[0].numel()):  # the largest into what others leave
        if tensor.numel() > _LARGE:
            hand_back_memory()
        tensor.data = tensor.data.to(dtype)
    hand_back_memory()
    notes = [f"the residual stream is rotated; in float32 the model's output differs by {error:.0e}"]
    for name, weight in untied.items():
        size = weight.numel() * weight.element_size() / 2**20
        notes.append(f"{name} is no longer tied to the embedding: rotated, they differ ({size:.1f} MB more)")
    return Rotated(notes, frozenset(_readers(stream)))


def _promote(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        before, tensor.data = tensor.data, tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        hand_back_pages([before])


def _untie(model: nn.Module, stream: Stream) -> dict[str, nn.Parameter]:
    """Readers that share a weight with a writer get their own. Returns reader -> the weight it had."""
    written = {id(p) for name in stream.writers for p, _ in output_weights(model.get_submodule(name))}
    untied = {}
    for name in _readers(stream):
        module = model.get_submodule(name)
        shared = module._parameters.get("weight")
        if shared is not None and id(shared) in written:
            module.weight = nn.Parameter(shared.data, requires_grad=shared.requires_grad)
            untied[name] = shared
    return untied


def _rotate(model: nn.Module, stream: Stream, seed: int) -> None:
    originals = [parameter.data for parameter in model.parameters()]
    norms = [model.get_submodule(name) for name in stream.norms]
    rotation = _rotation(norms, stream.width, seed)
    for norm, readers in zip(norms, stream.norms.values(), strict=True):
        fold_gain(norm, [model.get_submodule(reader) for reader in readers], rotation)
        hand_back_pages(originals)
    for names, weights in ((_readers(stream), input_weights), (stream.writers, output_weights)):
        found = [(name, *entry) for name in names for entry in weights(model.get_submodule(name))]
        for name, parameter, dim in {id(entry[1]): entry for entry in found}.values():  # some serve several modules
            if parameter.shape[dim] != stream.width:
                raise StreamError(f"{name} holds a weight of another shape: {tuple(parameter.shape)}")
            parameter.data = in_float64(parameter.data, dim, rotation)
            hand_back_pages(originals)


def _readers(stream: Stream) -> list[str]:
    return [*stream.readers, *(reader for readers in stream.norms.values() for reader in readers)]


def _rotation(norms: list[nn.Module], width: int, seed: int) -> Rotation:
    """The first kind of random rotation that all norms commute with."""
    for make in (random_hadamard, mean_preserving):
        rotation = make(width, seed)
        if all(commutes(norm, rotation) for norm in norms):
            return rotation
    kinds = ", ".join(sorted({type(norm).__name__ for norm in norms}))
    raise StreamError(f"no rotation commutes with its norms ({kinds})")


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Every floating tensor that the model returns."""
    try:
        leaves = tree_flatten(dict(model(**batch)))[0]
    except RuntimeError as error:
        raise StreamError(f"it does not run in float32: {error}") from None
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(new: list[Tensor], old: list[Tensor]) -> float:
    """The largest relative error of the outputs, of each what varies over its channels."""
    errors = [0.0]
    for a, b in zip(new, old, strict=True):
        size = (b - b.mean(-1, keepdim=True)).norm() if b.dim() else b.norm()
        errors.append(float((a - b).norm() / size.clamp(min=torch.finfo(b.dtype).tiny)))
    return max(errors, key=lambda error: (error != error, error))  # NaN is the worst


def _few_tokens(batch: Batch) -> Batch:
    """The first tokens of a batch of token ids, and what belongs to them."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] <= _TOKENS:
        return batch
    sequence = ids.shape[1]
    return {
        key: x[:, :_TOKENS] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == sequence else x
        for key, x in batch.items()
    }
