"""Whether the Triton kernels run here. Triton comes with torch's CUDA builds and is imported at first need only."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

_HERE: AbstractContextManager[object] = nullcontext()
_LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix units and asynchronous copies


def interpreted() -> bool:
    """Whether Triton interprets its kernels with numpy (``TRITON_INTERPRET=1``): for tests, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable_because() -> str | None:
    """Why the kernels do not run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if not any(_has_units(index) for index in range(torch.cuda.device_count())):
        return f"no GPU here has compute capability {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} or newer"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether they run on tensors of a device."""
    if device.type == "cpu":
        return interpreted() and unavailable_because() is None
    return device.type == "cuda" and unavailable_because() is None and (interpreted() or _has_units(device.index))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it kernels are launched where the tensor lies; to switch to where one is takes longer than a launch."""
    here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(tensor.device)


@cache
def _has_units(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= _LEAST_CAPABILITY
