"""The Triton kernels for NVIDIA GPUs, working on packed tensors as they lie on disk.

Importing this does not import Triton: that happens when a kernel is first launched.
"""

from hf_lowbit.kernels.triton.compiled import ALIGNMENT
from hf_lowbit.kernels.triton.device import interpreted, runs_on, unavailable_because
from hf_lowbit.kernels.triton.matrix import FLOAT_TYPES, Matrix, describe
from hf_lowbit.kernels.triton.prepared import prepare
from hf_lowbit.kernels.triton.products import (
    decode_rows,
    is_fused,
    linear,
    linear_gradient,
    linear_of_codes,
    multiplies_codes,
    quantize_tokens,
    quantizes,
)
from hf_lowbit.kernels.triton.state_space import VALUE_TYPES, causal_convolution, selective_scan

__all__ = [
    "ALIGNMENT",
    "FLOAT_TYPES",
    "VALUE_TYPES",
    "Matrix",
    "causal_convolution",
    "decode_rows",
    "describe",
    "interpreted",
    "is_fused",
    "linear",
    "linear_gradient",
    "linear_of_codes",
    "multiplies_codes",
    "prepare",
    "quantize_tokens",
    "quantizes",
    "runs_on",
    "selective_scan",
    "unavailable_because",
]
