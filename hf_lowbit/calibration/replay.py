"""Replay: blocks that are finished hand on what they returned before, instead of computing it once for every block
that follows.

A U-Net has no chain of blocks: the arguments of each come from a forward of the whole model up to it. With the finished
blocks replayed, such a forward costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_lowbit.calibration.forwards import replaced_forwards


@dataclass(frozen=True)
class _Output:
    leaves: list[Any]
    spec: TreeSpec

    @property
    def size(self) -> int:
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves if isinstance(leaf, Tensor))

    def value(self) -> Any:
        """A copy: what follows may change tensors in place."""
        return tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec)


class Replay:
    """What finished blocks of one model return, by block, batch and call.

    A block is computed once more, in the first forward after it is finished, and its output kept. Bits are the same as
    without.

    Args:
        model: whose blocks they are.
        limit: bytes that are kept; blocks beyond are computed each time. None for no limit.
    """

    def __init__(self, model: nn.Module, limit: int | None = None) -> None:
        self._model, self._limit, self._held = model, limit, 0
        self._finished: list[str] = []
        self._outputs: dict[tuple[str, int, int], _Output] = {}

    def finish(self, block: str) -> None:
        """The block will not change any more."""
        self._finished.append(block)

    @contextmanager
    def handing_on(self, batch: int) -> Iterator[None]:
        """Within it, a forward on the batch of this number takes from finished blocks what is kept of them."""
        modules = {name: self._model.get_submodule(name) for name in self._finished}
        replayed = {module: _Replayed(self, name, batch, module.forward) for name, module in modules.items()}
        with replaced_forwards(replayed):
            yield

    def output(self, name: str, batch: int, call: int, forward: Any, args: Any, kwargs: Any) -> Any:
        """What is kept of a call, or what it computes, which is kept."""
        if (kept := self._outputs.get((name, batch, call))) is not None:
            return kept.value()
        value = forward(*args, **kwargs)
        output = _Output(*tree_flatten(value))
        if self._limit is None or self._held + output.size <= self._limit:
            self._held += output.size
            self._outputs[name, batch, call] = output
            return output.value()
        return value


class _Replayed:
    """In the place of a finished block's forward, for one batch."""

    def __init__(self, replay: Replay, name: str, batch: int, forward: Any) -> None:
        self._replay, self._name, self._batch, self._forward, self._calls = replay, name, batch, forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, self._calls = self._calls, self._calls + 1
        return self._replay.output(self._name, self._batch, call, self._forward, args, kwargs)
