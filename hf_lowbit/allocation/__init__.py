"""Which layer gets which bits: an integer program over measured losses."""

from hf_lowbit.allocation.budget import budget_bits
from hf_lowbit.allocation.combination import combined
from hf_lowbit.allocation.integer_program import AllocationError, Option, allocate
from hf_lowbit.allocation.selection import select_exactly
from hf_lowbit.allocation.sizes import GroupSize, stored_sizes

__all__ = [
    "AllocationError",
    "GroupSize",
    "Option",
    "allocate",
    "budget_bits",
    "combined",
    "select_exactly",
    "stored_sizes",
]
