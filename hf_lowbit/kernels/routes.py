"""Which way a product takes: the one table of crossovers, as benchmarks/crossovers.py measures them.

On an NVIDIA GPU the Triton kernels have their own (see :mod:`hf_lowbit.kernels.triton.products`). On a CPU:

- reference: decode everything with torch, multiply with torch;
- native: the native kernel, which decodes codes in registers and reads them once per four or eight tokens; where it has
  a matrix unit or products of bfloat16 pairs, it decodes once for 128 or 256 and takes any number of tokens;
- tiles: the native kernel decodes some rows into a buffer, torch multiplies: for many tokens;
- int8: the native kernel for inputs quantized to integers of 8 bits or fewer, which with AVX-512 decodes once for many,
  too, but for base 3;
- floats: quantized inputs as float32, by native or tiles, where one side is no integers: torch is slower at it;
- sliced: quantized inputs through torch, group by group: for many tokens where its int8 product is faster; integers of
  which the native kernel has no products, or that have other groups on both sides: their sums stay exact.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor
from hf_lowbit.formats.packed import with_plain_scales
from hf_lowbit.kernels import cpu, humming, triton

BACKENDS = ("reference", "cpu", "triton", "humming")
_OF_GPUS = ("triton", "humming")  # the latter leaves most to the former

# The most tokens for which decoding in registers beats decoding into a tile, by whether torch multiplies the input's
# type faster than float32 here. Integer inputs always take the native kernel: unpacking with torch costs more than it.
NATIVE_TOKENS = 32
NATIVE_TOKENS_FAST_TYPE = 12

# The most tokens for which the native kernel, where it decodes anew for every four of them, beats unpacking codes for
# torch's int8 product, where there is one scale per row and per token: that product is many times faster where the
# processor has int8 dot products. Codes that cross bytes, and digits of base 3, take torch several times as long.
INT8_TOKENS = 192
INT8_TOKENS_NOT_IN_BYTES = 768


def route(x: Tensor, matrix: cpu.Matrix | None, activation: ActivationSpec | None) -> str:
    """The way for x ``[tokens, columns]`` and a weight whose native view is ``matrix``: one of those above."""
    if matrix is None:
        return "reference"
    if activation is None:
        is_fast_type = x.dtype != torch.float32 and multiplies_fast(x.dtype)
        most = NATIVE_TOKENS_FAST_TYPE if is_fast_type else NATIVE_TOKENS
        return "native" if x.shape[0] <= most or cpu.multiplies_many(matrix, x.dtype) else "tiles"
    if not _multiplies_codes(matrix, activation):
        return "sliced" if _are_integers(matrix, activation) else "floats"
    most = INT8_TOKENS if _lies_in_bytes(matrix) else INT8_TOKENS_NOT_IN_BYTES
    return "sliced" if x.shape[0] > most and _suits_torch(matrix, activation) else "int8"


def native(packed: PackedTensor, device: torch.device, dtype: torch.dtype, backend: str | None) -> cpu.Matrix | None:
    """The native view of a weight, for inputs on ``device`` and floats of ``dtype``; None if torch has to do it."""
    if backend not in (None, "cpu") or device.type != "cpu" or dtype not in cpu.FLOAT_TYPES or not cpu.available():
        return None
    return cpu.describe(packed)


def on_gpu(packed: PackedTensor, device: torch.device, dtype: torch.dtype, backend: str | None) -> triton.Matrix | None:
    """The view of a weight for the Triton kernels, likewise; on CPU tensors only where they are forced, interpreted."""
    if not gpu_runs(device, backend) or packed.weight.device != device:
        return None
    return triton.describe(packed, dtype)


def gpu_runs(device: torch.device, backend: str | None) -> bool:
    """Whether inputs on ``device`` are for the Triton kernels."""
    return (backend in _OF_GPUS or (backend is None and device.type == "cuda")) and triton.runs_on(device)


def kernel_of(packed: PackedTensor, activation: ActivationSpec | None, backend: str | None) -> str:
    """Which kernel multiplies few tokens with this weight where it lies now: for reports.

    "torch"; "cpu"; or "cpu, row by row" for layouts that the native kernel decodes before it multiplies, at several
    times the cost: groups that cut a lane's run of codes. Multiples of 32 never do, in base 3 multiples of 5. On a GPU
    "triton", or "triton, decoded" for layouts that are decoded to memory first. With ", scales decoded" where scales
    are codes, which torch decodes at every product. With the backend "humming" also how many tokens that takes.
    """
    if packed.scale_range is not None:
        return f"{kernel_of(with_plain_scales(packed), activation, backend)}, scales decoded"
    first = packed[0] if packed.weight.dim() > 2 else packed
    gpu = on_gpu(first, first.weight.device, torch.bfloat16, backend)
    if gpu is not None:
        if activation is not None:
            return "triton" if triton.multiplies_codes(gpu, activation) else "torch"
        name = "triton" if triton.is_fused(gpu) else "triton, decoded"
        return humming.told(name) if backend == "humming" and humming.suits(first) else name
    matrix = native(first, first.weight.device, torch.float32, backend)
    if matrix is None:
        return "torch"
    if activation is not None and _are_integers(matrix, activation):
        return "cpu" if _multiplies_codes(matrix, activation) else "torch"
    return "cpu" if cpu.multiplies_in_registers(matrix) else "cpu, row by row"


def _multiplies_codes(matrix: cpu.Matrix, activation: ActivationSpec) -> bool:
    has_its_groups = activation.group_size is None or activation.groups(matrix.columns) == matrix.struct.groups
    has_least_code = activation.bits == 8 and activation.has_shift  # -128, whose sign AVX2 cannot change
    if has_least_code and cpu.instruction_set() == "avx2":
        return False
    return activation.format == "int" and has_its_groups and cpu.multiplies_int8(matrix)


def _are_integers(matrix: cpu.Matrix, activation: ActivationSpec) -> bool:
    return activation.format == "int" and matrix.struct.integer_multiplier > 0


def _suits_torch(matrix: cpu.Matrix, activation: ActivationSpec) -> bool:
    one_scale = matrix.struct.groups == 1 and activation.groups(matrix.columns) == 1
    return one_scale and has_int8_dot() and not cpu.multiplies_many(matrix, torch.int8)


def _lies_in_bytes(matrix: cpu.Matrix) -> bool:
    return matrix.spec.packing == "dense" and 8 % matrix.spec.bits == 0


def why_not(backend: str | None) -> str | None:
    """Why a forced backend does not run here, naming what does; None if it does."""
    if backend is None or backend == "reference":
        return None
    if backend not in BACKENDS:
        return f"backend {backend!r} does not exist; there are: {', '.join(BACKENDS)}"
    reason = {"cpu": cpu, "triton": triton, "humming": humming}[backend].unavailable_because()
    return None if reason is None else f"backend {backend!r} does not run here ({reason}); 'reference' does"


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


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are faster there than those of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = _capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _capabilities() -> dict[str, object]:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities
