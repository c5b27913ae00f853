"""How far a distance between sets of pictures can be trusted: against other seeds, and against other pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 200


def noise_interval(
    sets: Sequence[Tensor],
    distance: Callable[[Tensor, Tensor], float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval of the distance between two sets of pictures of one model that differ by their seeds.

    For each prompt two of its pictures, of different seeds, are drawn at random, one for either set: both sets have
    the same prompts and as many pictures as each of the given ones. A distance is within noise when it is not above
    the interval. Below it are sets that are more alike than other seeds are, as those from the same seeds.

    Args:
        sets: features [n, d] (or anything whose rows belong to pictures) of two or more seeds, the same prompts in the
            same order. With only two, the interval is over how they are shared out, and somewhat too narrow.
        distance: of two such sets.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: fewer than two sets, sets of different shapes, or a confidence outside (0, 1).
    """
    if len(sets) < 2 or len({given.shape for given in sets}) > 1:
        shapes = ", ".join(str(list(given.shape)) for given in sets)
        raise ValueError(f"at least 2 sets of the same pictures with other seeds are needed, not [{shapes}]")
    stacked = torch.stack(list(sets))  # [k, n, ...]
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(stacked.shape[1])
    values = []
    for _ in range(resamples):
        order = torch.rand(stacked.shape[:2], generator=generator).argsort(0)  # a permutation of the seeds per picture
        values.append(distance(stacked[order[0], positions], stacked[order[1], positions]))
    return _interval(values, confidence)


def paired_interval(
    first: Tensor,
    second: Tensor,
    distance: Callable[[Tensor, Tensor], float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of the distance between sets whose rows belong together (the same prompts and seeds).

    The same rows of both are drawn with replacement. Fréchet distances of resamples are biased as those of fewer
    pictures are: the interval tells methods apart, and need not hold the distance of all pictures in its middle.

    Args:
        first, second: features [n, d] each.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: other numbers of pictures, or a confidence outside (0, 1).
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} pictures are no pairs")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(resamples):
        rows = torch.randint(len(first), (len(first),), generator=generator)
        values.append(distance(first[rows], second[rows]))
    return _interval(values, confidence)


def is_within_noise(distance: float, interval: tuple[float, float]) -> bool:
    """Not above the interval of :func:`noise_interval`."""
    return distance <= interval[1]


def _interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
