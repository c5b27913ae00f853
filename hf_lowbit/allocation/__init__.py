"""Which layer gets which bits: an integer program over measured losses."""

from hf_lowbit.allocation.integer_program import AllocationError, Option, allocate

__all__ = ["AllocationError", "Option", "allocate"]
