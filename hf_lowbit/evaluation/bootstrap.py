"""Bootstrap intervals of a ratio of sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_interval(
    sums: Sequence[float],
    weights: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of sum(sums) / sum(weights) over units drawn with replacement.

    The units are windows of text (sums of nats, weighted by tokens) or utterances (errors, weighted by words). They
    are taken to be independent; with few units the interval is somewhat too narrow.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: fewer than two units, another number of weights, a weight that is not positive, or a confidence
            outside (0, 1).
    """
    if len(sums) != len(weights):
        raise ValueError(f"{len(sums)} sums and {len(weights)} weights: one of each a unit")
    values = np.asarray([sums, weights], dtype=np.float64)
    units = values.shape[1]
    if units < 2:
        raise ValueError(f"an interval needs at least 2 units to draw from, there is {units}")
    if not (values[1] > 0).all():
        raise ValueError("every weight must be positive")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1")
    # How often each unit is drawn in each resample, [resamples, units].
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
    totals = counts @ values.T
    tail = 50 * (1 - confidence)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [tail, 100 - tail])
    return float(low), float(high)
