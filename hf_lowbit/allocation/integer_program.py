"""The choice of one option per layer that loses least within a budget of bits.

A multiple-choice knapsack, solved as an integer program (HAWQ-V3, arXiv 2011.10680, allocates bits so; MixDQ, arXiv
2405.17873, too).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_SECONDS = 60.0
_LARGEST_LOSS = 1e6  # what losses are scaled to: the solver stops within an absolute gap of 1e-6


class AllocationError(ValueError):
    """A budget that no choice of options meets; the message names the smallest and the largest possible one."""


class Option(NamedTuple):
    """One way to store a layer, or a group of layers that must be stored alike.

    Attributes:
        bits: everything stored for it, in bits.
        loss: what it costs the model; losses of layers add up.
    """

    bits: int
    loss: float


def allocate(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of one option per layer, of least total loss with at most ``budget`` bits in all.

    Of equal losses the smaller one is taken.

    Args:
        options: for every layer, what it may become; at least one.
        budget: in bits.

    Raises:
        AllocationError: the budget is below the smallest possible size.
        ValueError: a layer without options, or a loss that is not finite.
    """
    if any(not choices for choices in options):
        raise ValueError("every layer needs at least one option")
    if not all(np.isfinite(option.loss) for choices in options for option in choices):
        raise ValueError("a layer's loss is NaN or infinite: its sensitivity could not be measured")
    smallest = sum(min(option.bits for option in choices) for choices in options)
    largest = sum(max(option.bits for option in choices) for choices in options)
    if budget < smallest:
        raise AllocationError(f"a budget of {budget} bits cannot be met: the options need {smallest} to {largest}")
    useful = [undominated(choices) for choices in options]
    limit = budget
    while True:
        picks = _solve(options, useful, limit)
        spent = sum(choices[pick].bits for choices, pick in zip(options, picks, strict=True))
        if spent <= budget:
            return _spend_rest(options, useful, picks, budget - spent)
        limit -= spent - budget  # the solver's tolerance, in a case where a few bits decide


def _solve(options: Sequence[Sequence[Option]], useful: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The picks of least loss among the useful options, within the budget up to the solver's tolerance.

    Sizes are counted from each layer's smallest option in units of their greatest common divisor: whole numbers, mostly
    small, which the solver adds up exactly.
    """
    smallest = [options[i][kept[0]].bits for i, kept in enumerate(useful)]
    extra = [options[i][k].bits - smallest[i] for i, kept in enumerate(useful) for k in kept]
    unit = math.gcd(*extra) or 1
    room = (budget - sum(smallest)) // unit
    if room < 0:
        raise AllocationError(f"no allocation of {budget} bits was found; allow a slightly larger budget")
    losses = np.array([options[i][k].loss for i, kept in enumerate(useful) for k in kept], dtype=float)
    layer = np.repeat(np.arange(len(options)), [len(kept) for kept in useful])
    one_each = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    size = np.array([bits // unit for bits in extra], dtype=float)
    result = milp(
        _LARGEST_LOSS * losses / max(np.abs(losses).max(), 1e-300),
        integrality=np.ones(len(layer)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None, :], -np.inf, room + 0.5)],
        options={"mip_rel_gap": 1e-9, "time_limit": _SECONDS},
    )
    if result.x is None:
        raise AllocationError(f"no allocation of {budget} bits was found: {result.message}")
    starts = np.cumsum([0, *(len(kept) for kept in useful[:-1])])
    return [
        kept[int(np.argmax(result.x[start : start + len(kept)]))] for start, kept in zip(starts, useful, strict=True)
    ]


def _spend_rest(
    options: Sequence[Sequence[Option]], useful: Sequence[Sequence[int]], picks: list[int], rest: int
) -> list[int]:
    """Single upgrades that still fit, of which a solver that stops within its gap or at its time limit leaves some."""
    picks = list(picks)
    while True:
        better = [
            (options[i][k].loss - options[i][pick].loss, i, k)
            for i, pick in enumerate(picks)
            for k in useful[i]
            if options[i][k].bits - options[i][pick].bits <= rest and options[i][k].loss < options[i][pick].loss
        ]
        if not better:
            return picks
        _, i, k = min(better)
        rest -= options[i][k].bits - options[i][picks[i]].bits
        picks[i] = k


def undominated(choices: Sequence[Option]) -> list[int]:
    """Options that no other one beats in both size and loss, the smallest first."""
    kept: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: choices[i]):
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept
