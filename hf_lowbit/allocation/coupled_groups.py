"""Bits of layers in two groups that are judged by different metrics, within coupled budgets (MixDQ, arXiv 2405.17873).

What a layer of one group loses cannot be compared with what one of the other loses. So each group has a budget of its
own, an integer program spends it, and the ratio between the budgets is tried out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hf_lowbit.allocation.integer_program import AllocationError

TOLERANCE = 0.02  # mean bits of a group lie this close to its budget: the paper's
_SECONDS = 30.0
_LARGEST_SCORE = 1e4  # what differences of scores are scaled to, beside the solver's absolute gap of 1e-6


@dataclass(frozen=True)
class ScoredLayer:
    """What a layer can become.

    Attributes:
        size: its part in the mean: weights, or inputs.
        scores: bits -> how well the model does with it so; scores of layers of a group add up.
    """

    size: int
    scores: Mapping[int, float]


@dataclass(frozen=True)
class Allocation:
    """One way to spend a budget.

    Attributes:
        first, second: bits of every layer of the two groups.
        budget: mean bits of both groups together, as asked.
        ratio: of the first group's budget to the second's; 1 where one of them is empty.
        mean: bits as they are.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    budget: float
    ratio: float
    mean: float


def coupled_budgets(budget: float, sizes: float, ratio: float) -> tuple[float, float]:
    """Mean bits of two groups whose overall mean is ``budget``: the first has ``ratio`` times those of the second.

    Args:
        sizes: size of the first group over that of the second.
    """
    second = budget * (1 + sizes) / (ratio * sizes + 1)
    return ratio * second, second


def allocate_group(layers: Sequence[ScoredLayer], mean_bits: float, tolerance: float = TOLERANCE) -> tuple[int, ...]:
    """Bits of every layer, of the largest sum of scores with a mean within ``tolerance`` of ``mean_bits``.

    Raises:
        AllocationError: no choice has such a mean; the message names what can be reached.
        ValueError: a layer without candidates, or a score that is not finite.
    """
    if not layers:
        return ()
    if not all(layer.scores for layer in layers):
        raise ValueError("every layer needs at least one candidate")
    if not all(math.isfinite(score) for layer in layers for score in layer.scores.values()):
        raise ValueError("a layer's score is NaN or infinite: its sensitivity could not be measured")
    least, most = reachable(layers)
    if not least - tolerance <= mean_bits <= most + tolerance:
        raise AllocationError(f"a mean of {mean_bits:g} bits cannot be reached: the candidates allow {_span(layers)}")
    found = _solve(layers, mean_bits, tolerance)
    if found is None:
        raise AllocationError(
            f"no choice of bits has a mean within {tolerance:g} of {mean_bits:g}: {len(layers)} layers allow "
            f"{_span(layers)}, and some of them are too large for every mean between to be met"
        )
    return found


def candidates(
    first: Sequence[ScoredLayer],
    second: Sequence[ScoredLayer],
    target: float,
    budgets: Sequence[float],
    ratios: Sequence[float],
    tolerance: float = TOLERANCE,
) -> list[Allocation]:
    """Distinct allocations of all budgets and ratios, those with the mean nearest to the target first.

    Ratios that ask a group for more or less than it can have are left out, and so are allocations above the target,
    unless all are.

    Raises:
        AllocationError: no ratio is left for any budget.
    """
    everything = [*first, *second]
    total = sum(layer.size for layer in everything)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Allocation] = {}
    solved: dict[tuple[int, float], tuple[int, ...] | None] = {}

    def solve(which: int, layers: Sequence[ScoredLayer], mean: float) -> tuple[int, ...] | None:
        key = which, round(mean, 6)
        if key not in solved:
            try:
                solved[key] = allocate_group(layers, mean, tolerance)
            except AllocationError:
                solved[key] = None
        return solved[key]

    both = bool(first and second)
    shares = sum(layer.size for layer in first) / sum(layer.size for layer in second) if both else 1.0
    for budget, ratio in product(budgets, ratios if both else [1.0]):
        means = coupled_budgets(budget, shares, ratio) if both else (budget, budget)
        picks = [solve(i, layers, mean) for i, (layers, mean) in enumerate(zip((first, second), means, strict=True))]
        if picks[0] is None or picks[1] is None:
            continue
        bits = sum(layer.size * b for layer, b in zip(everything, (*picks[0], *picks[1]), strict=True))
        found.setdefault((picks[0], picks[1]), Allocation(picks[0], picks[1], budget, ratio, bits / total))
    if not found:
        raise AllocationError(
            f"no allocation of {target:g} bits was found with a mean of each group within {tolerance:g} of its budget: "
            f"{len(everything)} layers allow {_span(everything)}, the first group {_span(first)} and the second "
            f"{_span(second)}; change budget or candidates, or search more layers: few and large ones leave gaps"
        )
    within = [allocation for allocation in found.values() if allocation.mean <= target + 1e-9]
    return sorted(within or found.values(), key=lambda allocation: abs(allocation.mean - target))


def reachable(layers: Sequence[ScoredLayer]) -> tuple[float, float]:
    """The smallest and the largest mean."""
    total = sum(layer.size for layer in layers)
    least, most = (sum(layer.size * extreme(layer.scores) for layer in layers) / total for extreme in (min, max))
    return least, most


def _span(layers: Sequence[ScoredLayer]) -> str:
    if not layers:
        return "none"
    least, most = reachable(layers)
    return f"{math.ceil(1e4 * least - 1e-6) / 1e4:g} to {math.floor(1e4 * most + 1e-6) / 1e4:g} bits"


def _solve(layers: Sequence[ScoredLayer], mean_bits: float, tolerance: float) -> tuple[int, ...] | None:
    """The integer program; None where it has no solution. Sizes are counted in units of their common divisor."""
    unit = math.gcd(*(layer.size for layer in layers))
    choices = [(index, bits) for index, layer in enumerate(layers) for bits in layer.scores]
    scores = np.array([layers[index].scores[bits] for index, bits in choices])
    best = np.array([max(layers[index].scores.values()) for index, _ in choices])
    losses = best - scores  # a layer's best is free: what is scaled are differences
    sizes = np.array([bits * (layers[index].size // unit) for index, bits in choices], dtype=float)
    total = sum(layer.size for layer in layers) / unit
    where = np.array([index for index, _ in choices])
    one_each = csr_array((np.ones(len(where)), (where, np.arange(len(where)))))
    result = milp(
        _LARGEST_SCORE * losses / max(losses.max(), 1e-300),
        integrality=np.ones(len(where)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes[None, :] / total, mean_bits - tolerance, mean_bits + tolerance),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    chosen = [0] * len(layers)
    for (index, bits), taken in zip(choices, result.x, strict=True):
        if taken > 0.5:
            chosen[index] = bits
    return tuple(chosen)
