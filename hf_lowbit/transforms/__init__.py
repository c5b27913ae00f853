"""Exactly function-preserving rewrites made before rounding."""

from hf_lowbit.transforms.fold import (
    FoldError,
    divide_outputs,
    expand_scale,
    fold_scale,
    gather_repeats,
    multiply_inputs,
)
from hf_lowbit.transforms.scales import activation_scale, smoothing_scale

__all__ = [
    "FoldError",
    "activation_scale",
    "divide_outputs",
    "expand_scale",
    "fold_scale",
    "gather_repeats",
    "multiply_inputs",
    "smoothing_scale",
]
