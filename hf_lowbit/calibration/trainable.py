"""A quantized model while something of it is trained: its floats are float32, only what is meant has gradients, and
of the activations only those between blocks are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_lowbit.calibration.forwards import replaced_forwards
from hf_lowbit.calibration.heap import alone


@contextmanager
def in_float32(model: nn.Module, tables_stay: bool = False) -> Iterator[dict[Tensor, torch.dtype]]:
    """Within it floating tensors of the model are float32; yields the types that they have, and get back.

    Args:
        tables_stay: weights of linear layers and embeddings, a small model's largest tensors, stay as they are: for
            autocast, which multiplies by the same values. What embeddings return is float32.
    """
    readers = [m for m in model.modules() if tables_stay and isinstance(m, nn.Linear | nn.Embedding)]
    tables = {reader.weight for reader in readers}
    types = {t: t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t not in tables}
    handles = [
        reader.register_forward_hook(lambda module, args, output: output.float())
        for reader in readers
        if isinstance(reader, nn.Embedding)
    ]
    try:
        for table in tables:
            table.data = alone(table.data)
        for tensor in types:
            tensor.data = tensor.data.float()
        yield types
    finally:
        for handle in handles:
            handle.remove()
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


@contextmanager
def recomputing(blocks: Collection[nn.Module]) -> Iterator[None]:
    """Within it the activations inside these modules are computed again where a gradient needs them, not kept (Chen et
    al. 2016, arXiv 1604.06174). Gradients are the same.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with replaced_forwards({module: partial(again, module.forward) for module in blocks}):
        yield
