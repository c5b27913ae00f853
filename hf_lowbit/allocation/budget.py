"""Budgets in bits per weight, and what sizes can meet them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from hf_lowbit.allocation.integer_program import AllocationError


def budget_bits(
    bits_per_weight: float, sizes: Sequence[Sequence[int]], elements: int, allows_less: bool = False
) -> int:
    """How many bits may be stored in all: the most that still are ``bits_per_weight`` over ``elements`` weights.

    Args:
        bits_per_weight: the budget.
        sizes: per layer, the bits of each of its options.
        elements: weights in all layers, at least one.
        allows_less: a budget above the largest size is that size.

    Raises:
        AllocationError: below the smallest or above the largest size of the options; it names both.
    """
    smallest, largest = (sum(extreme(choices) for choices in sizes) for extreme in (min, max))
    if allows_less and bits_per_weight > largest / elements:
        return largest
    if not (math.isfinite(bits_per_weight) and smallest / elements <= bits_per_weight <= largest / elements):
        low, high = math.ceil(1e4 * smallest / elements) / 1e4, math.floor(1e4 * largest / elements) / 1e4
        within = f"exactly {smallest / elements:g}" if smallest == largest else f"{low:g} to {high:g}"
        raise AllocationError(
            f"{bits_per_weight:g} bits per weight cannot be reached: these candidates store {within} bits per weight, "
            "scales and zero points included; change the budget, the candidates or the group size"
        )
    bits = math.floor(Fraction(bits_per_weight) * elements)
    while (bits + 1) / elements <= bits_per_weight:  # 3.3 as a float lies below 3.3
        bits += 1
    return bits
