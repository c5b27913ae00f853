"""The native CPU kernels: C++ behind a C interface, working on packed tensors as they lie on disk."""

from hf_lowbit.kernels.cpu.library import (
    available,
    instruction_set,
    instruction_sets,
    unavailable_because,
    use_instruction_set,
)
from hf_lowbit.kernels.cpu.matrix import Matrix, describe
from hf_lowbit.kernels.cpu.products import (
    FLOAT_TYPES,
    decode_rows,
    has_matrix_unit,
    linear,
    linear_int8,
    multiplies_in_registers,
    multiplies_int8,
)

__all__ = [
    "FLOAT_TYPES",
    "Matrix",
    "available",
    "decode_rows",
    "describe",
    "has_matrix_unit",
    "instruction_set",
    "instruction_sets",
    "linear",
    "linear_int8",
    "multiplies_in_registers",
    "multiplies_int8",
    "unavailable_because",
    "use_instruction_set",
]
