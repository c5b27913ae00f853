"""Launches of kernels that are compiled already, without Triton's way to find them.

That way inspects all arguments in Python at each call, for longer than most products, or the scan of a decoded token,
take the GPU. Here it is gone once for each kernel, device, key, and kind of arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.kernels.triton.device import on_device_of

Grid = tuple[int, int, int]

ALIGNMENT = 16
_MOST_FOUND = 1 << 12


class Plan(NamedTuple):
    """What a launch takes besides the arguments of a call, which come first."""

    grid: Grid
    numbers: tuple[float, ...]
    constants: dict[str, Any]  # and num_warps, launch_pdl


class Found(NamedTuple):
    """A compiled kernel with its grid, and its arguments after those of a call."""

    run: Callable[..., None]
    others: tuple[Any, ...]


_found: dict[tuple[Any, ...], Found] = {}


@dataclass(frozen=True)
class Bound:
    """Launches of a product, for other inputs and outputs.

    Attributes:
        steps: what is launched, and its tensors between the first and the last, by address.
        kept: tensors that must live as long; weights do not: who has them asks for new launches when they change.
        between: bytes that a step gives to the next.
    """

    steps: tuple[tuple[Found, tuple[int | None, ...]], ...]
    kept: tuple[Tensor | None, ...] = ()
    between: int = 0

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Multiply inputs like those before, aligned and contiguous, into ``out``."""
        with on_device_of(x):
            stream = torch._C._cuda_getCurrentRawStream(x.get_device())
            given = x
            for (run, others), places in self.steps[:-1]:
                result = torch.empty(self.between, dtype=torch.int8, device=x.device)
                run(given.data_ptr(), *places, result.data_ptr(), *others, stream=stream)
                given = result
            (run, others), places = self.steps[-1]
            run(given.data_ptr(), *places, out.data_ptr(), *others, stream=stream)


def addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    """Of their data."""
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def launch(
    kernel: Any, key: tuple[Any, ...], arguments: tuple[Any, ...], plan: Callable[[], Plan], on: Tensor
) -> Found | None:
    """Launch by plan, on the device of a tensor; what was launched, or None in the interpreter, which compiles nothing.

    Args:
        key: says all that the plan depends on.
        arguments: tensors, numbers, None and tuples of these, which may be others in each call.
        plan: is asked where no launch before had the key and arguments of the same kinds.
    """
    with on_device_of(on):
        whole = (kernel, on.get_device(), *key, *_kinds(arguments))
        found = _found.get(whole)
        if found is not None:
            found.run(*arguments, *found.others)
            return found
        grid, numbers, constants = plan()
        compiled = kernel[grid](*arguments, *numbers, **constants)
        if compiled is None:
            return None
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        names = kernel.arg_names[len(arguments) + len(numbers) :]
        found = _found[whole] = Found(compiled[grid], (*numbers, *(constants[name] for name in names)))
        return found


def _kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles kernels for: types, alignment, what is missing; integers of one, and multiples of 16."""
    kinds: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            kinds += value.dtype, value.data_ptr() % ALIGNMENT
        elif value is None:
            kinds.append(None)
        elif isinstance(value, int):
            kinds.append((value == 1, value % ALIGNMENT == 0, value >> 31 == 0))
        else:
            kinds.append(_kinds(value) if isinstance(value, tuple) else type(value))
    return tuple(kinds)
