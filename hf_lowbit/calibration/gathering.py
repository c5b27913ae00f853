"""Statistics of what the layers of a block read, gathered while data runs through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_lowbit.calibration.matrices import Matrix, inputs_of
from hf_lowbit.calibration.statistics import Statistic


class _Enough(Exception):
    """All that a batch has to tell was told: raised out of the block's forward, whose output nobody reads."""


class Gathering:
    """Updates statistics with what matrices' layers read; the first of those that read one tensor does for all.

    A batch ends where the last layer has read its input: the rest of the block would be computed for nothing. That is
    known once a batch of the same shapes has called each layer once; where one is called more or less often, such as an
    expert, every batch runs to its end.

    Args:
        module: the block.
        matrices: key -> one that is float and has inputs.
        statistics: key -> the statistic of each.

    Attributes:
        alias: key -> that of the statistic that counts for it.
    """

    def __init__(self, module: nn.Module, matrices: Mapping[str, Matrix], statistics: Mapping[str, Statistic]) -> None:
        self._module, self._statistics = module, statistics
        self._kinds = {matrix.layer: matrix.skeleton.kind for matrix in matrices.values()}
        self.alias: dict[str, str] = {}
        self._read: list[tuple[Tensor, str]] = []
        self._calls: Counter[str] = Counter()
        self._once: set[tuple[Any, ...]] = set()  # shapes of batches that called each layer once
        self._may_stop = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it layers tell what they read."""
        handles = [
            self._module.get_submodule(layer).register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: self._hear(layer, module, args, kwargs), with_kwargs=True
            )
            for layer in self._kinds
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, *arguments: Any) -> Iterator[None]:
        """Around one call of the block with these arguments."""
        shapes = tuple(leaf.shape for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        self._read.clear()
        self._calls.clear()
        self._may_stop = shapes in self._once
        try:
            yield
        except _Enough:
            return
        finally:
            self._read.clear()
        if all(self._calls[layer] == 1 for layer in self._kinds):
            self._once.add(shapes)

    def _hear(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._take(layer, module, args, kwargs)
        self._calls[layer] += 1
        if self._may_stop and len(self._calls) == len(self._kinds):
            raise _Enough

    def _take(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        prefix, kind = f"{layer}." if layer else "", self._kinds[layer]
        if kind not in ("experts", "conv1d", "conv2d"):
            key, x = f"{prefix}weight", args[0] if args else next(iter(kwargs.values()))
            first = next((other for tensor, other in self._read if tensor is x), None)
            if first is not None:
                self.alias[key] = first
                return
            self._read.append((x, key))
        for parameter, expert, x in inputs_of(module, kind, args, kwargs):
            key = f"{prefix}{parameter}" + ("" if expert is None else f"[{expert}]")
            if key in self._statistics:
                self._statistics[key].update(x)
