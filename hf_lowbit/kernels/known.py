"""Products that are known but for the values of their input; of many tokens, but for their number too.

Decoding takes hundreds of products for every token, and what each needs beside its input (layout, route, addresses,
launch) is the same as for the last token: to find it takes longer than most products. So what was found is kept, by all
that it depends on. As addresses are among that, nobody has to tell when a weight is moved, replaced or repacked: then
the product is another one. What is written to the same place is read from there. Prompts have any length: of many
tokens only those products are kept that take the same way for every number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.kernels import cpu, humming, triton
from hf_lowbit.kernels.routes import native, on_gpu, route

MOST_TOKENS = 16  # few: a product for each number of them

Product: TypeAlias = Callable[[Tensor], list[Tensor]]
"""Contiguous inputs of one type and device, few of one shape, times matrices that lie where they lay: by address."""

_MOST_KNOWN = 1 << 16
_known: dict[tuple[Any, ...], dict[tuple[int, ...], Product | None]] = {}  # by inputs, then by what multiplies them
_specs: dict[int, WeightSpec] = {}  # which keys have by their identity: they stay alive


def known_products(x: Tensor, weights: Sequence[PackedTensor], backend: str | None) -> Product | None:
    """From x ``[..., columns]``, not quantized, to its products ``[..., rows]`` with packed matrices.

    None where there is more to a product than a call of a kernel: no kernel, scales that are codes, many tokens where
    their number decides which way they take.

    What belongs to one product comes from memory every time, a line after the other: codes have pushed it out of the
    caches since the last token. So there is little of it: plain numbers are compared, and what is common lies together.
    """
    is_many = x.numel() > MOST_TOKENS * x.shape[-1]
    if not x.is_contiguous() or (is_many and x.is_cuda):
        return None
    key: list[int] = []
    for packed in weights:
        weight, scale, zero_point, table = packed.weight, packed.scale, packed.zero_point, packed.table
        if packed.scale_range is not None or not (weight.is_contiguous() and scale.is_contiguous()):
            return None
        key += weight.data_ptr(), scale.data_ptr(), weight.numel(), packed.columns, id(packed.spec)
        if zero_point is not None:
            if not zero_point.is_contiguous():
                return None
            key.append(zero_point.data_ptr())
        if table is not None:
            key.append(table.data_ptr())
    inputs, matrices = (None if is_many else x.shape, x.dtype, x.device, backend), tuple(key)
    try:
        return _known[inputs][matrices]
    except KeyError:
        pass
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # to find it is to launch it once more
        return None
    if sum(map(len, _known.values())) >= _MOST_KNOWN:
        _known.clear()
        _specs.clear()
    found = _known.setdefault(inputs, {})[matrices] = (_find_many if is_many else _find)(x, weights, backend)
    _specs.update((id(packed.spec), packed.spec) for packed in weights)
    return found


def _find(x: Tensor, weights: Sequence[PackedTensor], backend: str | None) -> Product | None:
    tokens, count = x.reshape(-1, x.shape[-1]), len(weights)
    if not len(tokens) or any(packed.columns != x.shape[-1] for packed in weights):
        return None
    natives = [native(packed, x.device, x.dtype, backend) for packed in weights]
    chosen = [matrix for matrix in natives if matrix is not None and route(tokens, matrix, None) == "native"]
    if len(chosen) == count:
        return cpu.prepare(x, chosen)
    if any(packed.table is not None for packed in weights):  # of which launches read a copy in x's type
        return None
    on_gpus = [on_gpu(packed, x.device, x.dtype, backend) for packed in weights]
    matrices = [matrix for matrix in on_gpus if matrix is not None]
    if len(matrices) < count or (backend == "humming" and any(humming.takes(tokens, packed) for packed in weights)):
        return None
    return _launches(x, matrices)


def _find_many(x: Tensor, weights: Sequence[PackedTensor], backend: str | None) -> Product | None:
    columns = x.shape[-1]
    if any(packed.columns != columns for packed in weights):
        return None
    natives = [native(packed, x.device, x.dtype, backend) for packed in weights]
    matrices = [matrix for matrix in natives if matrix is not None and cpu.multiplies_many(matrix, x.dtype)]
    if len(matrices) < len(weights):
        return None

    def product(x: Tensor) -> list[Tensor]:
        results, leading = cpu.linear(x.view(-1, columns), matrices), x.shape[:-1]
        return [result.view(*leading, matrix.rows) for result, matrix in zip(results, matrices, strict=True)]

    return product


def _launches(x: Tensor, matrices: Sequence[triton.Matrix]) -> Product | None:
    """As few as there can be: matrices that are alike share one."""
    tokens, shapes = x.reshape(-1, x.shape[-1]), [(*x.shape[:-1], matrix.rows) for matrix in matrices]
    launch = triton.prepare(tokens, matrices)
    if launch is None:
        return None

    def product(x: Tensor) -> list[Tensor]:
        if x.data_ptr() % triton.ALIGNMENT:
            x = x.clone()
        results = [x.new_empty(*shape) for shape in shapes]  # sooner than of a tuple
        launch(x, *results)
        return results

    return product
