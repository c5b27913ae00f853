"""Products with packed weights. One dispatch; today's backend is the torch reference."""

from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.kernels.reference import packed_linear
from hf_lowbit.kernels.sliced import multiplies_integers, sliced_linear

__all__ = ["multiplies_integers", "packed_linear", "quantize_tokens", "sliced_linear"]
