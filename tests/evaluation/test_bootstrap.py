"""Bootstrap intervals: of the right width, weighted, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from hf_lowbit.evaluation import bootstrap_interval


def test_coverage_of_a_known_mean_is_near_the_nominal_one() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        weights = rng.integers(200, 512, 40)
        means = rng.normal(3.0, 0.5, 40)
        low, high = bootstrap_interval(weights * means, weights, resamples=500, seed=trial)
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_width_matches_the_standard_error() -> None:
    values = np.random.default_rng(2).normal(0.0, 1.0, 400)
    low, high = bootstrap_interval(values, np.ones(400))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_units_count_by_their_weight() -> None:
    low, high = bootstrap_interval([0.0] * 50 + [1.0] * 50, [1000.0] * 50 + [1.0] * 50)
    assert 0 < low < 50 / 50_050 < high < 0.01


def test_the_seed_decides() -> None:
    sums, weights = [1.0, 5.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0]
    assert bootstrap_interval(sums, weights, seed=3) == bootstrap_interval(sums, weights, seed=3)
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values, np.ones(50), seed=3) != bootstrap_interval(values, np.ones(50), seed=4)


def test_equal_units_have_no_spread() -> None:
    assert bootstrap_interval([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("sums", "weights", "confidence", "message"),
    [
        ([1.0], [1.0], 0.95, "at least 2 units"),
        ([1.0, 2.0], [1.0, 0.0], 0.95, "positive"),
        ([1.0, 2.0], [1.0, 1.0], 95, "between 0 and 1"),
        ([1.0, 2.0], [1.0], 0.95, "2 sums and 1 weights"),
    ],
)
def test_refusals(sums: list[float], weights: list[float], confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(sums, weights, confidence=confidence)
