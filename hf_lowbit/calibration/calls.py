"""Calls of blocks, captured from the model itself: arguments, what flows from block to block, and how to repeat them.

No class per model: one real forward shows which tensor of a block's arguments is the output of the block before (it is
the same object). With that known, the arguments of every block for the whole calibration set come from forwards in
which the blocks only hand on what they are given, at next to no cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_lowbit.calibration.store import TensorStore, to_compute

_LARGE = 1 << 20  # bytes from which a captured argument goes to the store


class NotAChain(Exception):
    """Blocks that do not run one after the other on each other's outputs."""


class _Stop(Exception):
    """Ends a forward once everything is captured."""


@dataclass(frozen=True)
class Flow:
    """What a block hands to the next.

    Attributes:
        outgoing: index of the tensor among a block's flattened outputs.
        incoming: index of the same tensor among the next block's flattened arguments.
        leaves: the block's other outputs as they were in one real forward, for the shape of what it returns.
        spec: structure of its outputs.
    """

    outgoing: int
    incoming: int
    leaves: tuple[Any, ...]
    spec: TreeSpec


@dataclass
class Call:
    """One block's arguments for one batch, without the tensor that flows in."""

    leaves: list[Any]
    spec: TreeSpec


@dataclass(frozen=True)
class _Stored:
    """A large argument, kept in the store."""

    key: int


class Calls:
    """The captured calls of one stack on all batches.

    Attributes:
        flows: per block but the last.
        inputs: store key, per batch, of what flows into the first block; none for a stack of one.
    """

    def __init__(self, store: TensorStore, incoming: Sequence[int | None], flows: Sequence[Flow]) -> None:
        self._store, self._incoming, self.flows = store, incoming, flows
        self._calls: list[list[Call]] = []
        self.inputs: list[int] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, calls: list[Call]) -> None:
        """One batch; its first flowing tensor moves to :attr:`inputs`."""
        first = self._incoming[0]
        if first is not None:
            self.inputs.append(self._store.put(calls[0].leaves[first]))
        known: dict[int, _Stored] = {}
        for call, incoming in zip(calls, self._incoming, strict=True):
            for index, leaf in enumerate(call.leaves):
                if index == incoming:
                    call.leaves[index] = None
                elif isinstance(leaf, Tensor) and leaf.numel() * leaf.element_size() >= _LARGE:
                    if id(leaf) not in known:
                        known[id(leaf)] = _Stored(self._store.put(leaf))
                    call.leaves[index] = known[id(leaf)]
        self._calls.append(calls)

    def arguments(
        self, batch: int, block: int, flowing: Tensor | None, dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a block for a batch, floats in ``dtype``."""
        call = self._calls[batch][block]
        leaves = [self._store.get(leaf.key) if isinstance(leaf, _Stored) else leaf for leaf in call.leaves]
        incoming = self._incoming[block]
        if incoming is not None:
            leaves[incoming] = flowing
        args, kwargs = tree_unflatten([to_compute(leaf, dtype) for leaf in leaves], call.spec)
        return args, kwargs

    def output(self, block: int, value: Any) -> Tensor:
        """The tensor that flows on, of what a block returned; of the last block, its first tensor."""
        leaves = tree_flatten(value)[0]
        if block < len(self.flows):
            result = leaves[self.flows[block].outgoing]
        else:
            result = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
        assert isinstance(result, Tensor)
        return result


@torch.no_grad()
def probe(
    model: nn.Module, batch: dict[str, Any], names: Sequence[str]
) -> tuple[list[str], dict[str, list[Any]], set[str]]:
    """One real forward.

    Returns:
        Names of the called modules in the order of their first call; name -> [arguments flattened, outputs flattened,
        structure of the outputs] of the first call; names of those that were called again.
    """
    order: list[str] = []
    seen: dict[str, list[Any]] = {}
    again: set[str] = set()

    def before(name: str, args: Any, kwargs: Any) -> None:
        if name in seen:
            again.add(name)
            return
        order.append(name)
        seen[name] = [tree_flatten((args, kwargs))[0]]

    def after(name: str, output: Any) -> None:
        if len(seen[name]) == 1:
            seen[name] += list(tree_flatten(output))

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, args, output, name=name: after(name, output)))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return order, seen, again


def chain(blocks: Sequence[str], seen: dict[str, list[Any]]) -> tuple[list[int | None], list[Flow]]:
    """How a stack's blocks hang together: the flowing argument of each, and the flows between them.

    Raises:
        NotAChain: a block was not called, or is not fed by the one before.
    """
    missing = [block for block in blocks if block not in seen]
    if missing:
        raise NotAChain(f"{missing[0]} is not called")
    if len(blocks) == 1:
        return [None], []
    flows: list[Flow] = []
    incoming: list[int | None] = []
    for block, following in pairwise(blocks):
        outputs, arguments = seen[block][1], seen[following][0]
        pairs = [
            (i, j)
            for i, output in enumerate(outputs)
            for j, argument in enumerate(arguments)
            if isinstance(output, Tensor) and output is argument
        ]
        if len(pairs) != 1:
            raise NotAChain(f"{following} does not run on the output of {block}")
        leaves = tuple(None if index == pairs[0][0] else leaf for index, leaf in enumerate(outputs))
        flows.append(Flow(*pairs[0], leaves, seen[block][2]))
        incoming.append(pairs[0][1])
    return [incoming[0], *incoming], flows


@torch.no_grad()
def capture(
    model: nn.Module,
    blocks: Sequence[str],
    batches: Sequence[dict[str, Any]],
    incoming: Sequence[int | None],
    flows: Sequence[Flow],
    store: TensorStore,
) -> Calls:
    """The arguments of every block for every batch, from forwards that compute nothing within the stack.

    Raises:
        NotAChain: a forward ends before the last block is reached.
    """
    calls = Calls(store, incoming, flows)
    modules = [model.get_submodule(block) for block in blocks]
    for batch in batches:
        captured: list[Call] = []
        with _echoing(modules, incoming, flows, captured), suppress(_Stop):
            model(**batch)
        if len(captured) != len(blocks):
            raise NotAChain(f"only {len(captured)} of {len(blocks)} blocks are called on some of the data")
        calls.add(captured)
    return calls


@contextmanager
def _echoing(
    modules: Sequence[nn.Module], incoming: Sequence[int | None], flows: Sequence[Flow], captured: list[Call]
) -> Iterator[None]:
    """Blocks record their arguments and hand on what flows in; the last one ends the forward."""

    def echo(index: int, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        captured.append(Call(leaves, spec))
        if index == len(modules) - 1:
            raise _Stop
        flow, position = flows[index], incoming[index]
        assert position is not None
        outputs = list(flow.leaves)
        outputs[flow.outgoing] = leaves[position]
        return tree_unflatten(outputs, flow.spec)

    own = [module.__dict__.get("forward") for module in modules]  # of its own where accelerate has hooked it
    for index, module in enumerate(modules):
        module.forward = lambda *args, index=index, **kwargs: echo(index, args, kwargs)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
