"""A quantized model while something of it is trained: its floats are float32, and only what is meant has gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[dict[Tensor, torch.dtype]]:
    """Within it all floating tensors of the model are float32; yields the type that each has, and gets back."""
    types = {t: t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    try:
        for tensor in types:
            tensor.data = tensor.data.float()
        yield types
    finally:
        for tensor, dtype in types.items():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def only_trained(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Within it, of the model's own parameters only these collect gradients."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
