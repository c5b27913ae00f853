"""The output error of one module of a block while other weights are tried in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.trial import copy_call, first_floating
from hf_lowbit.transforms.fold import input_weights

Quantize = Callable[[str, Tensor], Tensor]  # key, weight [rows, columns] -> its dequantized values
Call = tuple[tuple[Any, ...], dict[str, Any]]


class OutputError:
    """Squared error of a module's output over some calls, for each of several trials.

    A :class:`hf_lowbit.calibration.statistics.Statistic` as far as adding up over processes goes.

    Attributes:
        tokens: vectors of the output that one trial sees.
        errors: float64 ``[trials]``.
    """

    def __init__(self, module: nn.Module, calls: Sequence[Call], trials: int) -> None:
        """Runs the module as it is: what it returns now is right."""
        self._module, self._calls = module, calls
        self._right = [first_output(module(*args, **kwargs)) for args, kwargs in calls]
        self.tokens = sum(right[..., 0].numel() for right in self._right)
        self.errors = torch.zeros(trials, dtype=torch.float64)

    def measure(self, trial: int) -> None:
        """Add the error of the module as it is now."""
        for (args, kwargs), right in zip(self._calls, self._right, strict=True):
            difference = first_output(self._module(*args, **kwargs)) - right
            self.errors[trial] += float(difference.square().sum())

    def update(self, x: Tensor) -> None:
        """Nothing: it runs its module itself."""

    def summed(self) -> list[Tensor]:
        return [self.errors]

    def largest(self) -> list[Tensor]:
        return []


@contextmanager
def simulated(block: Block, layers: Mapping[str, Sequence[str]], scale: Tensor, quantize: Quantize) -> Iterator[None]:
    """Layers compute with Q(W diag(s)) diag(1/s) until the context ends, then with the very W they had.

    Args:
        layers: name in the block -> keys of its matrices that read the scaled input.
        scale: ``[columns]``.
    """
    weights = [part for name in layers for part in input_weights(block.module.get_submodule(name))]
    originals = [weight.detach().clone() for weight, _ in weights]
    along = [scale.to(w).reshape([-1 if d == dim else 1 for d in range(w.dim())]) for w, dim in weights]
    try:
        for (weight, _), s in zip(weights, along, strict=True):
            weight.data.mul_(s)
        for key in (key for keys in layers.values() for key in keys):
            matrix = block.matrices[key].weight
            matrix.copy_(quantize(key, matrix))
        for (weight, _), s in zip(weights, along, strict=True):
            weight.data.div_(s)
        yield
    finally:
        for (weight, _), original in zip(weights, originals, strict=True):
            weight.data.copy_(original)


def captured_calls(block: Block, module: nn.Module, batches: int) -> list[Call]:
    """Copies of a module's arguments in the block's first batches."""
    calls: list[Call] = []
    hook = lambda m, args, kwargs: calls.append(copy_call(args, kwargs))  # noqa: E731
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in range(batches):
            block.run(batch)
    finally:
        handle.remove()
    return calls


def common_owner(block: nn.Module, names: Sequence[str]) -> str:
    """The deepest module with a forward of its own that holds all of them; one name is its own."""
    owner = names[0]
    while not all(name == owner or not owner or name.startswith(f"{owner}.") for name in names) or isinstance(
        block.get_submodule(owner), nn.ModuleList | nn.ModuleDict
    ):
        owner = owner.rpartition(".")[0]
    return owner


def first_output(value: Any) -> Tensor:
    """The first floating tensor of what a module returned."""
    output = first_floating(value)
    assert output is not None
    return output
