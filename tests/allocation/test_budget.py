"""Budgets in bits per weight become whole bits, and are refused where no choice meets them."""

from __future__ import annotations

import pytest

from hf_lowbit.allocation import AllocationError, Option, allocate, budget_bits

SIZES = [[20, 30, 40], [25, 45], [10]]  # the last one is given


@pytest.mark.parametrize("elements", [7, 10, 30, 77])
@pytest.mark.parametrize("bits", range(55, 96))
def test_the_budget_holds_what_it_names_exactly(bits: int, elements: int) -> None:
    """Whatever sizes a report would show as the budget are within it, and one more bit is not."""
    assert budget_bits(bits / elements, SIZES, elements) == bits


@pytest.mark.parametrize("wrong", [5.49, 9.51, 0.0, -1.0, float("nan"), float("inf")])
def test_what_cannot_be_reached_is_refused(wrong: float) -> None:
    with pytest.raises(AllocationError, match=r"5\.5 to 9\.5 bits per weight"):
        budget_bits(wrong, SIZES, 10)


def test_the_range_that_is_named_can_be_asked_for() -> None:
    """Its ends are rounded inwards."""
    sizes, elements = [[100, 200]], 33
    with pytest.raises(AllocationError, match=r"3\.0304 to 6\.0606"):
        budget_bits(1, sizes, elements)
    assert budget_bits(3.0304, sizes, elements) == 100 and budget_bits(6.0606, sizes, elements) == 199
    with pytest.raises(AllocationError, match="exactly 4 bits"):
        budget_bits(3, [[40]], 10)


def test_large_models_are_allocated_to_the_bit() -> None:
    """Sizes far beyond the solver's tolerance: every budget is met, and a step more or less makes a difference."""
    step = 16_777_216
    options = [[Option(2 * step, 4.0 + i), Option(3 * step, 1.0 + i / 10), Option(4 * step, 0.1)] for i in range(60)]
    smallest = 120 * step
    assert sum(allocate(options, smallest)) == 0
    assert sum(allocate(options, smallest + step - 1)) == 0
    assert sum(allocate(options, smallest + step)) == 1
    assert sum(allocate(options, smallest + 120 * step - 1)) == 119
    odd = [[Option(2 * step + i % 7, 4.0), Option(3 * step + i % 5 + 1, 1.0)] for i in range(40)]
    least = sum(choices[0].bits for choices in odd)
    for extra in (0, step - 3, step, 5 * step + 1):
        picks = allocate(odd, least + extra)
        assert sum(choices[pick].bits for choices, pick in zip(odd, picks, strict=True)) <= least + extra


def test_nothing_useful_is_left_unspent() -> None:
    """Gains a billion times smaller than the largest loss still are taken."""
    options = [[Option(2, 1e9), Option(3, 1e8)]] + [[Option(2, 1e-3), Option(3, 1e-4)] for _ in range(5)]
    assert sum(allocate(options, 12 + 4)) == 4
    assert allocate(options, 12 + 4)[0] == 1
    assert allocate(options, 12 + 6) == [1] * 6


def test_a_budget_that_allows_less_may_lie_above_the_largest_size() -> None:
    assert budget_bits(9.6, SIZES, 10, allows_less=True) == 95
    assert budget_bits(9.4, SIZES, 10, allows_less=True) == 94
    with pytest.raises(AllocationError, match=r"5\.4 bits per weight cannot be reached"):
        budget_bits(5.4, SIZES, 10, allows_less=True)
