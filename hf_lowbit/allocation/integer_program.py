"""The choice of one option per layer that loses least within a budget of bits.

A multiple-choice knapsack, solved as an integer program (HAWQ-V3, arXiv 2011.10680, allocates bits so; MixDQ, arXiv
2405.17873, too).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

_SECONDS = 60.0


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
    useful = [_undominated(choices) for choices in options]
    bits = np.array([options[i][k].bits for i, kept in enumerate(useful) for k in kept], dtype=float)
    losses = np.array([options[i][k].loss for i, kept in enumerate(useful) for k in kept], dtype=float)
    layer = np.repeat(np.arange(len(options)), [len(kept) for kept in useful])
    one_each = (layer[None, :] == np.arange(len(options))[:, None]).astype(float)
    scale = max(np.abs(losses).max(), 1e-300)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None, :] / budget, -np.inf, 1.0)]
    result = milp(
        losses / scale,
        integrality=np.ones(len(bits)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-9, "time_limit": _SECONDS},
    )
    if result.x is None:
        raise AllocationError(f"no allocation of {budget} bits was found: {result.message}")
    chosen = result.x.round().astype(int)
    starts = np.cumsum([0, *(len(kept) for kept in useful[:-1])])
    picks = [
        kept[int(np.argmax(chosen[start : start + len(kept)]))] for start, kept in zip(starts, useful, strict=True)
    ]
    spent = sum(choices[pick].bits for choices, pick in zip(options, picks, strict=True))
    if spent > budget:  # the solver's tolerance, in a case where a bit decides
        raise AllocationError(f"the allocation found takes {spent} bits of {budget}; allow a slightly larger budget")
    return picks


def _undominated(choices: Sequence[Option]) -> list[int]:
    """Options that no other one beats in both size and loss, the smallest first."""
    kept: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: choices[i]):
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept
