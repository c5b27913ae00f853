"""The native CPU kernels: C++ behind a C interface, working on packed tensors as they lie on disk."""

from hf_lowbit.kernels.cpu.grid_errors import rounding_errors
from hf_lowbit.kernels.cpu.library import (
    available,
    instruction_set,
    instruction_sets,
    unavailable_because,
    use_instruction_set,
)
from hf_lowbit.kernels.cpu.matrix import Matrix, describe
from hf_lowbit.kernels.cpu.operator import Described, forget, serve
from hf_lowbit.kernels.cpu.pages import gather_in_large_pages
from hf_lowbit.kernels.cpu.prepared import prepare
from hf_lowbit.kernels.cpu.products import (
    FLOAT_TYPES,
    VALUE_TYPES,
    decode_rows,
    linear,
    linear_int8,
    multiplies_in_registers,
    multiplies_int8,
    multiplies_many,
)
from hf_lowbit.kernels.cpu.quantize import quantize_tokens, quantizes
from hf_lowbit.kernels.cpu.state_space import causal_convolution, selective_scan

__all__ = [
    "FLOAT_TYPES",
    "VALUE_TYPES",
    "Described",
    "Matrix",
    "available",
    "causal_convolution",
    "decode_rows",
    "describe",
    "forget",
    "gather_in_large_pages",
    "instruction_set",
    "instruction_sets",
    "linear",
    "linear_int8",
    "multiplies_in_registers",
    "multiplies_int8",
    "multiplies_many",
    "prepare",
    "quantize_tokens",
    "quantizes",
    "rounding_errors",
    "selective_scan",
    "serve",
    "unavailable_because",
    "use_instruction_set",
]
