"""Calls of blocks, captured from the model itself: arguments, what flows from block to block, and how to repeat them.

With it known how blocks hang together (:mod:`hf_lowbit.calibration.chains`), the arguments of every block for the whole
calibration set come from forwards in which the blocks only hand on what they are given, at next to no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_lowbit.calibration.chains import Flow, NotAChain
from hf_lowbit.calibration.forwards import replaced_forwards
from hf_lowbit.calibration.replay import Replay
from hf_lowbit.calibration.store import TensorStore, to_compute

_LARGE = 1 << 20  # bytes from which a captured argument goes to the store


class _Stop(Exception):
    """Ends a forward once everything is captured."""


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
        timesteps: per batch, of its samples, as a denoiser is given them; None for a model without.
        broken: the first of them in which something that is read, or flows, is not finite; None for none.
    """

    def __init__(self, store: TensorStore, incoming: Sequence[int | None], flows: Sequence[Flow]) -> None:
        self._store, self._incoming, self.flows = store, incoming, flows
        self._calls: list[list[Call]] = []
        self._keys: list[int] = []
        self.inputs: list[int] = []
        self.timesteps: list[Any] = []
        self.broken: int | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, calls: list[Call], timestep: Any = None) -> None:
        """One batch; its first flowing tensor moves to :attr:`inputs`."""
        first = self._incoming[0]
        self.timesteps.append(timestep)
        self.check(len(self), *(leaf for call in calls for leaf in call.leaves))
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
                        self._keys.append(known[id(leaf)].key)
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
        """The tensor that flows on, of what a block returned; of the last block, its first tensor.

        Of a block alone that returns several of ``[batch, tokens, channels]``, as those of Flux and SD3 do for text and
        image: all of them, joined along the tokens. [ours; adding up their losses weights short texts higher]
        """
        leaves = tree_flatten(value)[0]
        if block < len(self.flows):
            result = leaves[self.flows[block].outgoing]
            assert isinstance(result, Tensor)
            return result
        floats = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if self.flows or any(x.dim() != 3 or x[:, 0].shape != floats[0][:, 0].shape for x in floats):
            return floats[0]
        return floats[0] if len(floats) == 1 else torch.cat(floats, dim=1)

    def check(self, batch: int, *values: Any) -> None:
        """Note a batch that reads NaN or infinity as :attr:`broken`; masks may hold minus infinity."""
        if self.broken is None and any(
            bool(value.isnan().any() or value.isposinf().any())
            for value in values
            if isinstance(value, Tensor) and value.is_floating_point()
        ):
            self.broken = batch

    def forget(self) -> None:
        """Drop the arguments from the store."""
        for key in self._keys:
            self._store.drop(key)
        self._keys, self._calls = [], []


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
        calls.add(captured, batch.get("timestep"))
    return calls


@torch.no_grad()
def capture_one(
    model: nn.Module,
    block: str,
    batches: Sequence[dict[str, Any]],
    times: int,
    store: TensorStore,
    replay: Replay | None = None,
) -> Calls:
    """The arguments of one block for every batch, from forwards that end with its last call.

    Args:
        times: how often a forward calls it; each call counts as a batch of its own.
        replay: hands on what blocks before it return.

    Raises:
        NotAChain: a forward that does not reach it.
    """
    calls = Calls(store, [None], [])
    for index, batch in enumerate(batches):
        captured: list[Call] = []
        replaying = nullcontext() if replay is None else replay.handing_on(index)
        with replaying, _recording(model.get_submodule(block), times, captured), suppress(_Stop):
            model(**batch)
        if not captured:
            raise NotAChain(f"{block} is not called on some of the data")
        for call in captured:
            calls.add([call], batch.get("timestep"))
    return calls


@contextmanager
def _recording(module: nn.Module, times: int, captured: list[Call]) -> Iterator[None]:
    """The module records its arguments; its last call ends the forward."""
    forward = module.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if len(captured) == times - 1:
            captured.append(Call(leaves, spec))
            raise _Stop
        # what follows may change them in place
        captured.append(Call([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))
        return forward(*args, **kwargs)

    with replaced_forwards({module: record}):
        yield


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

    def at(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: echo(index, args, kwargs)

    with replaced_forwards({module: at(index) for index, module in enumerate(modules)}):
        yield
