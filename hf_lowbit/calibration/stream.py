"""The residual stream of a model: who writes into it, which norms stand before its readers, found by trying [ours].

No table of architectures. One forward runs on a few tokens with the output of every layer cut off from what it was
computed from, so that gradients show what each layer reads: where a layer's input is a sum of others' outputs (scaled
per token, reshaped, gathered: the same for all channels), the gradient that starts from one vector everywhere is a
multiple of that vector everywhere. The stream is what the token embedding's output is added up with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from hf_lowbit.calibration.data.limits import token_embedding
from hf_lowbit.transforms.fold import input_weights, is_norm, output_channels

_TOLERANCE = 1e-4  # of gradients in float32


class StreamError(ValueError):
    """A model without a stream that can be rotated; the message says what stands in the way."""


@dataclass(frozen=True)
class Stream:
    """Names of modules in a model, in the order of their calls.

    Attributes:
        width: channels.
        writers: layers whose outputs are added up in it, the embeddings among them.
        norms: norm that reads it -> the layers that read the norm's output.
        readers: layers that read it without a norm between.
    """

    width: int
    writers: tuple[str, ...]
    norms: dict[str, tuple[str, ...]]
    readers: tuple[str, ...]


class _Output(NamedTuple):
    """One output of one call."""

    module: str
    leaf: Tensor


class _Reading(NamedTuple):
    """One call (or what the model returns: ""), and the outputs that its inputs are made of.

    Attributes:
        sources: index of an output -> whether the inputs are sums of it and others, the same for all channels.
    """

    module: str
    sources: dict[int, bool]


@torch.no_grad()
def find_stream(model: nn.Module, batch: dict[str, Any]) -> Stream:
    """The residual stream, as one forward shows it.

    Args:
        model: float32 or float64, in evaluation mode; it is not changed.
        batch: keyword arguments of its forward; few tokens are enough.

    Raises:
        StreamError: no embedding is called; something reads or writes the stream in a way that a rotation cannot be
            folded into.
    """
    modules = {name: module for name, module in model.named_modules() if _is_layer(module)}
    outputs, readings = _traced(model, modules, batch)
    embedded = [i for i, output in enumerate(outputs) if isinstance(modules[output.module], nn.Embedding)]
    tokens = token_embedding(model)  # not always the first: Whisper's encoder embeds positions before
    first = next((i for i in embedded if modules[outputs[i].module] is tokens), next(iter(embedded), None))
    if first is None:
        raise StreamError("no embedding is called on the data")
    width = outputs[first].leaf.shape[-1]
    norms = {name for name, module in modules.items() if is_norm(module)}
    inside = _added_up(outputs, readings, first, norms)
    writers = tuple(dict.fromkeys(outputs[index].module for index in sorted(inside)))
    _check_writers(modules, writers, {o.module for i, o in enumerate(outputs) if i not in inside}, width)
    before = _norms_before(outputs, readings, inside, norms)
    for name in before:
        if before[name] and name not in norms and not input_weights(modules[name]):
            kind = type(modules[name]).__name__
            raise StreamError(f"{name}, a {kind}, reads the stream: nothing can be folded into it")
    normed = [name for name in before if name in norms and before[name] is not None]
    _check_idle(modules, {output.module for output in outputs}, width)
    return Stream(
        width,
        writers,
        {norm: tuple(name for name in before if before[name] == norm) for norm in normed},
        tuple(name for name in before if before[name] == "" and name not in norms),
    )


def _is_layer(module: nn.Module) -> bool:
    """Whether all of a module's parameters, if any, are its own."""
    own = any(True for _ in module.parameters(recurse=False))
    return own and not any(True for child in module.children() for _ in child.parameters())


def _added_up(outputs: list[_Output], readings: list[_Reading], first: int, norms: set[str]) -> set[int]:
    """Indices of the outputs that are added to the first one, as far as any norm reads them.

    Outputs of other widths, such as gates of experts, can only scale whole tokens.
    """
    width = outputs[first].leaf.shape[-1]
    inside, more = set[int](), {first}
    while not more <= inside:
        inside |= more
        for reading in readings:
            if reading.module in norms and inside & reading.sources.keys():
                wide = {i: alike for i, alike in reading.sources.items() if outputs[i].leaf.shape[-1] == width}
                if not all(wide.values()):
                    raise StreamError(f"{reading.module} reads more than a sum of layers' outputs")
                more = more | wide.keys()
    return inside


def _norms_before(
    outputs: list[_Output], readings: list[_Reading], inside: set[int], norms: set[str]
) -> dict[str, str | None]:
    """Module -> the norm of the stream whose output it reads, "" for the stream itself, None for neither."""
    normed = {r.module for r in readings if r.module in norms and inside & r.sources.keys()}
    origin = {i: "" if i in inside else o.module for i, o in enumerate(outputs) if i in inside or o.module in normed}
    before: dict[str, str | None] = {}
    for name, sources in readings:
        touched = origin.keys() & sources.keys()
        places = {origin[index] for index in touched}
        if touched and not name:
            raise StreamError("the model returns its stream, so that a rotation would show")
        if not all(sources[index] for index in touched) or len(places) > 1:
            raise StreamError(f"{name or 'the model'} reads the stream in a way of its own")
        place = places.pop() if places else None
        if before.setdefault(name, place) != place or (place and name in norms):
            raise StreamError(f"{name} reads the stream after several norms")
    return before


def _check_writers(modules: dict[str, nn.Module], writers: tuple[str, ...], others: set[str], width: int) -> None:
    for name in writers:
        module = modules[name]
        kind = type(module).__name__
        foldable = isinstance(module, nn.Embedding) or hasattr(module, "down_proj")
        if not foldable and (is_norm(module) or output_channels(module) != width):
            raise StreamError(f"{name}, a {kind}, writes into the stream: nothing can be folded into it")
        if name in others:
            raise StreamError(f"{name}, a {kind}, writes into the stream in some of its calls only")


def _check_idle(modules: dict[str, nn.Module], called: set[str], width: int) -> None:
    for name, module in modules.items():
        if name not in called and any(width in parameter.shape for parameter in module.parameters()):
            raise StreamError(f"{name} is not called on the data: nothing shows whether it reads the stream")


def _traced(
    model: nn.Module, modules: dict[str, nn.Module], batch: dict[str, Any]
) -> tuple[list[_Output], list[_Reading]]:
    """Every output of every call, and what every call's inputs depend on."""
    outputs: list[_Output] = []
    calls: list[tuple[str, list[Tensor], int]] = []

    def read(name: str, values: Any) -> None:
        floats = [x for x in tree_flatten(values)[0] if isinstance(x, Tensor) and x.is_floating_point()]
        calls.append((name, [x for x in floats if x.requires_grad], len(outputs)))

    def cut(name: str, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaf = value.detach().requires_grad_()
        outputs.append(_Output(name, leaf))
        return leaf.clone()  # the model may change it in place

    with torch.enable_grad(), _constant(model):
        handles = []
        for name, module in modules.items():
            reading = lambda m, args, kwargs, name=name: read(name, (args, kwargs))  # noqa: E731
            cutting = lambda m, args, out, name=name: tree_map(lambda x: cut(name, x), out)  # noqa: E731
            handles.append(module.register_forward_pre_hook(reading, with_kwargs=True))
            handles.append(module.register_forward_hook(cutting))
        try:
            read("", model(**batch))
        finally:
            for handle in handles:
                handle.remove()
        leaves = [output.leaf for output in outputs]
        return outputs, [_Reading(name, _sources(floats, leaves[:count])) for name, floats, count in calls]


def _sources(floats: list[Tensor], leaves: list[Tensor]) -> dict[int, bool]:
    found: dict[int, bool] = {}
    for x in floats if leaves else []:
        vector = torch.randn(x.shape[-1:], generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
        gradients = torch.autograd.grad(x, leaves, vector.expand_as(x), retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None and bool(gradient.any()):
                found[index] = found.get(index, True) and _is_multiple(gradient, vector)
    return found


def _is_multiple(gradient: Tensor, vector: Tensor) -> bool:
    """Whether every row is a multiple of the vector."""
    if gradient.shape[-1:] != vector.shape:
        return False
    rows = gradient.reshape(-1, len(vector))
    along = (rows @ vector / vector.dot(vector))[:, None] * vector
    return bool((rows - along).norm() <= _TOLERANCE * rows.norm())


@contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in gradients."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in training:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
