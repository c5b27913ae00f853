"""Trial: a copy of a block on which scales are folded, tried on one call, and taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from hf_lowbit.transforms.fold import divide_outputs, input_channels, input_weights, multiply_inputs, output_channels


class Trial:
    """One block and one call, in float64 where the block can compute in it, else in float32.

    Attributes:
        precision: relative size of differences in the block's output that rounding explains.
        tolerance: the same for inputs of layers; blocks in float64 compute parts in float32 too.
        order: names of the modules that are called, by their first call.
        inputs: name of a module that reads channels -> its input in each call.
        outputs: every floating tensor that the block returns.
        unread: modules that could read channels but were not called, or on zeros only.
    """

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self._load(block, args, kwargs, torch.float64)
            self.precision, self.tolerance = 1e-13, 1e-6
        except (RuntimeError, TypeError):  # kernels and literal dtypes that know float32 only
            self._load(block, args, kwargs, torch.float32)
            self.precision, self.tolerance = 3e-7, 1e-3
        if not all(bool(torch.isfinite(output).all()) for output in self.outputs):
            raise ValueError("the block returns NaN or infinite values on the captured call; give another call")

    def _load(self, block: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype) -> None:
        self._module = copy.deepcopy(block).eval()
        self._module = self._module.double() if dtype == torch.float64 else self._module.float()
        self._call, self._dtype = (args, kwargs), dtype
        self.modules = dict(self._module.named_modules())
        readers = {name for name, module in self.modules.items() if input_channels(module) is not None}
        self.order: list[str] = []
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in readers}

        def note(name: str, x: Tensor | None) -> None:
            if name not in self.order:
                self.order.append(name)
            if name in readers and x is not None:
                self.inputs[name].append(x.clone())

        callable_ = {n for n, m in self.modules.items() if n in readers or output_channels(m) is not None}
        self.outputs = self.run(callable_, note)
        self.unread = [name for name in readers if not any(bool(x.any()) for x in self.inputs[name])]

    def run(self, watched: Collection[str] = (), note: Callable[[str, Tensor | None], None] | None = None) -> Any:
        """The block's outputs; ``note`` is told each call of the watched modules and the input they read."""
        with ExitStack() as stack:
            for name in watched:
                hook = lambda m, a, k, name=name: note(name, first_floating((a, k)))  # type: ignore[misc]  # noqa: E731
                stack.callback(self.modules[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
            args, kwargs = copy_call(*self._call, self._dtype)
            result = self._module(*args, **kwargs)
        return [leaf.clone() for leaf in tree_flatten(result)[0] if _is_floating(leaf)]

    @contextmanager
    def folded(
        self, previous: str | None, consumers: Sequence[str], scale: Tensor, consumed: Tensor, offset: bool = False
    ) -> Iterator[None]:
        """``previous`` divided by ``scale`` and ``consumers`` multiplied by ``consumed``, until the context ends."""
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            if previous is not None:
                own = [
                    p
                    for p in (self.modules[previous].weight, getattr(self.modules[previous], "bias", None))
                    if isinstance(p, nn.Parameter)
                ]
                kept += [(p, p.detach().clone()) for p in own]
                divide_outputs(self.modules[previous], scale, offset=offset)
            for name in consumers:
                kept += [(p, p.detach().clone()) for p, _ in input_weights(self.modules[name])]
                multiply_inputs(self.modules[name], consumed)
            yield
        finally:
            for parameter, value in reversed(kept):
                parameter.data.copy_(value)

    def is_dormant(self, name: str, scale: Tensor) -> bool:
        """Whether the call does not depend on the weight of a module that was not called (some code reads weights
        without calling their module)."""
        with self.folded(None, [name], scale, scale):
            return all(torch.equal(a, b) for a, b in zip(self.run(), self.outputs, strict=True))

    def preserves(self, outputs: list[Tensor], unbalanced: list[Tensor]) -> bool:
        """Whether ``outputs`` of a fold are the block's own, when folding the consumers alone gives ``unbalanced``.

        The error must be rounding beside what the fold does by halves: a limit relative to the output alone would
        pass anything in a branch that is small beside the residual. Every token counts alike: single ones have
        residuals thousands of times as large as the others'.
        """
        moved = False
        for own, new, half in zip(self.outputs, outputs, unbalanced, strict=True):
            tokens = own.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
            size, error, change = ((x / tokens).norm() for x in (own, new - own, half - own))
            if not bool(error <= 1e-4 * torch.minimum(change, size) + self.precision * size):
                return False
            moved |= bool(change > 1e3 * self.precision * size)
        return moved


def copy_call(args: Any, kwargs: Any, dtype: torch.dtype | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments, copied so that caches in them stay as they are; tensors passed twice stay one tensor."""
    known: dict[int, Tensor] = {}

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            known[id(leaf)] = leaf.to(dtype) if dtype is not None and leaf.is_floating_point() else leaf
        return known[id(leaf)]

    detached = tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf, (args, kwargs)
    )
    return tree_map(convert, copy.deepcopy(detached))


def first_floating(value: Any) -> Tensor | None:
    """The first floating tensor of a call's arguments: what a layer reads."""
    return next((leaf for leaf in tree_flatten(value)[0] if _is_floating(leaf)), None)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
