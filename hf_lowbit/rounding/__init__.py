"""How codes are chosen: tensors in, packed tensors out."""

from hf_lowbit.rounding.grid import RoundingError
from hf_lowbit.rounding.nearest import relative_error, round_to_nearest

__all__ = ["RoundingError", "relative_error", "round_to_nearest"]
