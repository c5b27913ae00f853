"""Launches of kernels that are compiled already, without Triton's way to find them.

That way inspects all arguments in Python at each call, for longer than most products, or the scan of a decoded token,
take the GPU. Here it is gone once for each kernel, device, key, and kind of arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
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
    constants: dict[str, Any]  # and num_warps, maxnreg, launch_pdl


class Found(NamedTuple):
    """What launches a compiled kernel: ``run(*grid, stream, *loaded, *arguments, *others)``, without launch hooks.

    What ``compiled[grid]`` does around it takes longer than itself.
    """

    run: Callable[..., None]
    grid: Grid
    loaded: tuple[Any, ...]
    others: tuple[Any, ...]


_found: dict[tuple[Any, ...], Found] = {}


class Step(NamedTuple):
    """A launch, the addresses of its tensors between input and outputs, and which outputs are its own."""

    found: Found
    places: tuple[int | None, ...]
    own: slice


@dataclass(frozen=True)
class Bound:
    """Launches of products with one input, for other inputs and outputs.

    Attributes:
        steps: what is launched, each for some of the outputs.
        kept: tensors that must live as long; weights do not: who has them asks for new launches when they change.
        first, between: what makes of the input the bytes, and how many, that all steps read instead of it.
    """

    steps: tuple[Step, ...]
    kept: tuple[Tensor | None, ...] = ()
    first: Found | None = None
    between: int = 0

    def __call__(self, x: Tensor, *out: Tensor) -> None:
        """Multiply inputs like those before, aligned and contiguous, into ``out``: one for each matrix."""
        device = x.get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(x, *out)
        stream, given = torch._C._cuda_getCurrentRawStream(device), x
        if self.first is not None:
            run, grid, loaded, others = self.first
            given = torch.empty(self.between, dtype=torch.int8, device=x.device)
            run(*grid, stream, *loaded, x.data_ptr(), given.data_ptr(), *others)
        for (run, grid, loaded, others), places, own in self.steps:
            run(*grid, stream, *loaded, given.data_ptr(), *places, *[one.data_ptr() for one in out[own]], *others)


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
            stream = torch._C._cuda_getCurrentRawStream(on.get_device())
            found.run(*found.grid, stream, *found.loaded, *arguments, *found.others)
            return found
        grid, numbers, constants = plan()
        compiled = kernel[grid](*arguments, *numbers, **constants)
        if compiled is None:
            return None
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        names = kernel.arg_names[len(arguments) + len(numbers) :]
        others = *numbers, *(constants[name] for name in names)
        found = _found[whole] = Found(*_direct(compiled, grid), others)
        return found


def _direct(compiled: Any, grid: Grid) -> tuple[Callable[..., None], Grid, tuple[Any, ...]]:
    """The function in C that Triton's launcher calls, and what it is given before a kernel's own arguments.

    Launchers differ between versions, but all they do in Python is to find memory that some kernels need at every
    launch: one that is asked what it would call tells. Where that is not so, it is the launcher itself.
    """
    launcher, loaded = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    told: list[tuple[Any, ...]] = []
    if hasattr(launcher, "launch"):
        asked = copy(launcher)
        asked.launch = lambda *given: told.append(given)
        asked(*grid, 0, *loaded)
    if not told or told[0][:4] != (*grid, 0) or any(isinstance(value, Tensor) for value in told[0]):
        return launcher, grid, loaded
    return launcher.launch, grid, told[0][4:]


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
