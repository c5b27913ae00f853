"""Launches of kernels that are compiled already, without Triton's way to find them.

That way inspects some sixty arguments of a scan in Python at each call, for longer than a decoded token's scan takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int = 4
) -> None:
    """Run ``kernel`` on the current device; its last parameters are ``constants``, in their order."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    key = (kernel, device, warps, tuple(constants.values()), _kinds(arguments))
    found = _compiled.get(key)
    if found is not None:
        found[grid](*arguments, *constants.values())
        return
    found = kernel[grid](*arguments, **constants, num_warps=warps)
    if found is not None:  # as it is where kernels are interpreted
        _compiled[key] = found


def _kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles kernels for: types, missing arguments, integers that are one, multiples of 16, or long."""
    kinds: list[Any] = []
    for value in arguments:
        if value is None:
            kinds.append(None)
        elif isinstance(value, int):
            kinds.append((value == 1, value % _ALIGNMENT == 0, value >> 31 == 0))
        elif isinstance(value, Tensor):
            kinds.append((value.dtype, value.data_ptr() % _ALIGNMENT == 0))
        elif isinstance(value, tuple):
            kinds.append(_kinds(value))
        else:
            kinds.append(type(value))
    return tuple(kinds)
