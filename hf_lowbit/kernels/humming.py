"""The optional backend "humming": products of the package humming-kernels (Apache 2.0), where it is faster than ours.

It takes what benchmarks/speed_gpu.py measures it faster for on an H200: 4-bit integers in groups of 128, and a middling
number of tokens. The rest is for the Triton kernels, and so is everything where the backend is not asked for.

Its kernels read codes in an order of their own. A weight is reordered at its first product, and the copy is kept as
long as the weight: as much GPU memory again. On disk, in state dicts and for everything else the weight stays as it is.
The package compiles a kernel with CUDA's NVRTC, for seconds, the first time that a shape has so many tokens.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_lowbit.formats import PackedTensor
from hf_lowbit.formats.spec import SCALE_DTYPES
from hf_lowbit.kernels import triton

TOKENS = range(17, 1025)
_BITS, _GROUP = 4, 128
_ROWS, _COLUMNS = 64, 128  # multiples that its kernels need


class _Kept(NamedTuple):
    """A reordered weight, and what it was made of."""

    versions: tuple[int, int]
    scale: Tensor
    layer: Any


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the weight's codes -> _Kept


def unavailable_because() -> str | None:
    """Why the backend does not run here, or None."""
    if importlib.util.find_spec("humming") is None:
        return "the package humming-kernels is not installed"
    return "the package needs an NVIDIA GPU" if triton.interpreted() else triton.unavailable_because()


def suits(packed: PackedTensor) -> bool:
    """Whether it has kernels for such a weight, which were measured."""
    spec, (rows, columns) = packed.spec, (packed.weight.shape[0], packed.columns)
    is_plain = spec.format == "int" and spec.symmetric and spec.packing == "dense" and spec.scale_bits is None
    is_measured = spec.bits == _BITS and spec.group_size == _GROUP
    return is_plain and is_measured and rows % _ROWS == 0 and columns % _COLUMNS == 0


def told(other: str) -> str:
    """For reports: what multiplies how many tokens."""
    return f"humming for {TOKENS.start} to {TOKENS[-1]} tokens, with a copy of the weight; {other}"


def takes(x: Tensor, packed: PackedTensor) -> bool:
    """Whether it is for inputs x ``[tokens, columns]``: in the type of the scales, so that these stay exact.

    While a CUDA graph is recorded nothing can be reordered: what has not been is left to the Triton kernels.
    """
    is_its_type = x.dtype in (torch.bfloat16, torch.float16) and x.dtype == SCALE_DTYPES[packed.spec.scale_dtype]
    if x.shape[0] not in TOKENS or not is_its_type or not suits(packed):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing()) or packed.weight in _kept


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """x ``[tokens, columns]`` to ``[tokens, rows]`` in x's type."""
    versions = _version(packed.weight), _version(packed.scale)
    kept = _kept.get(packed.weight)
    if kept is None or kept.versions != versions or kept.scale is not packed.scale:
        # Memory made while a CUDA graph warms up would be the graph's; that of another thread is not.
        with ThreadPoolExecutor(1) as outside:
            kept = _Kept(versions, packed.scale, outside.submit(_reorder, packed, x.dtype).result())
        _kept[packed.weight] = kept
    result: Tensor = kept.layer(x.contiguous())
    return result


@torch.no_grad()
def _reorder(packed: PackedTensor, dtype: torch.dtype) -> Any:
    """Its layer. Words and scales are loaded as they are: it starts from the same layout and offset."""
    from humming.layer import HummingLayer

    device = packed.weight.device
    with torch.cuda.device(device):
        layer = HummingLayer(
            packed.weight.shape[0],
            packed.columns,
            {"dtype": f"int{packed.spec.bits}", "group_size": _GROUP},
            torch_dtype=dtype,
        )
        layer = layer.to(device)
        layer.load_from_tensors({"weight": packed.weight, "weight_scale": packed.scale.view(dtype)})  # copies
        layer.transform()
        torch.cuda.synchronize(device)  # other streams read it
    return layer


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
