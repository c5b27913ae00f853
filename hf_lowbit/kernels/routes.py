"""Which way a product takes: the one table of crossovers, as measured by benchmarks/crossovers.py.

- reference: decode everything with torch, multiply with torch;
- gemv: the native kernel, which decodes codes in registers; reads them once per four or eight tokens;
- tiles: the native kernel decodes some rows into a buffer, torch multiplies: for many tokens;
- int8: the native kernel for int8 inputs;
- sliced: int8 or float8 inputs through torch, group by group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.kernels import cpu

BACKENDS = ("reference", "cpu")

# The most tokens for which decoding in registers beats decoding into a tile, by whether torch's own products are fast
# in the input's type on this processor.
GEMV_TOKENS = 24
GEMV_TOKENS_MATRIX_UNIT = 12
INT8_TOKENS = 64
INT8_TOKENS_DOT_UNIT = 16


def route(x: Tensor, packed: PackedTensor, activation: ActivationSpec | None, backend: str | None) -> str:
    """The way for x ``[tokens, columns]``: one of those above."""
    matrix = None if backend == "reference" else native(x, packed)
    if matrix is None:
        return "reference"
    tokens = x.shape[0]
    if activation is None:
        return "gemv" if tokens <= (GEMV_TOKENS_MATRIX_UNIT if multiplies_fast(x.dtype) else GEMV_TOKENS) else "tiles"
    if activation.format != "int" or not cpu.multiplies_int8(matrix):
        return "sliced"
    return "int8" if tokens <= (INT8_TOKENS_DOT_UNIT if has_int8_dot() else INT8_TOKENS) else "sliced"


def native(x: Tensor, packed: PackedTensor) -> cpu.Matrix | None:
    """The native view of a weight if the native kernels can take this product; else None."""
    if x.device.type != "cpu" or x.dtype not in cpu.FLOAT_TYPES or not cpu.available():
        return None
    return cpu.describe(packed)


def why_not(backend: str | None) -> str | None:
    """Why a forced backend does not run here, naming what does; None if it does."""
    if backend is None or backend == "reference":
        return None
    if backend not in BACKENDS:
        return f"backend {backend!r} does not exist; there are: {', '.join(BACKENDS)}"
    reason = cpu.unavailable_because()
    return None if reason is None else f"backend 'cpu' does not run here ({reason}); 'reference' does"


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of the type at least as fast as float32 ones."""
    if dtype == torch.float32:
        return True
    capabilities = _capabilities()
    return dtype == torch.bfloat16 and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@cache
def has_int8_dot() -> bool:
    """Whether this processor has int8 dot products; without them oneDNN's int8 product is far slower than float32."""
    capabilities = _capabilities()
    return any(capabilities.get(name) for name in ("avx512_vnni", "amx_int8"))


def _capabilities() -> dict[str, object]:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities
