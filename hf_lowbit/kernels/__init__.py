"""Products with packed weights: one dispatch over the torch reference and the native CPU kernels."""

from hf_lowbit.kernels.activation import Codes, quantize_tokens, restore_tokens
from hf_lowbit.kernels.decoding import decode_matrix, look_up_rows
from hf_lowbit.kernels.eager import is_eager, is_untouched
from hf_lowbit.kernels.grid_errors import rounding_errors
from hf_lowbit.kernels.kept import KeptMatrix, kept_product
from hf_lowbit.kernels.known import MOST_TOKENS, Product, known_products
from hf_lowbit.kernels.linear import packed_linear, packed_linears
from hf_lowbit.kernels.operand import Operand, quantize_codes
from hf_lowbit.kernels.products import convolution_of_codes
from hf_lowbit.kernels.routes import BACKENDS, NATIVE_TOKENS, kernel_of, why_not
from hf_lowbit.kernels.shifted import row_sums
from hf_lowbit.kernels.sliced import arithmetic, multiplies_integers, sliced_linear
from hf_lowbit.kernels.state_space import Scanned, causal_convolution, selective_scan

__all__ = [
    "BACKENDS",
    "MOST_TOKENS",
    "NATIVE_TOKENS",
    "Codes",
    "KeptMatrix",
    "Operand",
    "Product",
    "Scanned",
    "arithmetic",
    "causal_convolution",
    "convolution_of_codes",
    "decode_matrix",
    "is_eager",
    "is_untouched",
    "kept_product",
    "kernel_of",
    "known_products",
    "look_up_rows",
    "multiplies_integers",
    "packed_linear",
    "packed_linears",
    "quantize_codes",
    "quantize_tokens",
    "restore_tokens",
    "rounding_errors",
    "row_sums",
    "selective_scan",
    "sliced_linear",
    "why_not",
]
