"""Two groups with coupled budgets: means, couplings, the optimum, and refusals that name what can be reached."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from hf_lowbit.allocation import AllocationError
from hf_lowbit.allocation.coupled_groups import (
    TOLERANCE,
    ScoredLayer,
    allocate_group,
    candidates,
    coupled_budgets,
    reachable,
)


def group(count: int, widths: tuple[int, ...], seed: int = 0) -> list[ScoredLayer]:
    """Layers like those of a U-Net: sizes over two orders of magnitude, scores that grow with bits and saturate."""
    random = np.random.default_rng(seed)
    sizes = (10 ** random.uniform(3, 5, count)).astype(int) // 64 * 64
    return [
        ScoredLayer(int(size), {bits: float(1 - random.uniform(0.5, 1) * 4.0 ** (1 - bits)) for bits in widths})
        for size in sizes
    ]


def mean(layers: list[ScoredLayer], bits: tuple[int, ...]) -> float:
    total = sum(layer.size for layer in layers)
    return sum(layer.size * b for layer, b in zip(layers, bits, strict=True)) / total


def score(layers: list[ScoredLayer], bits: tuple[int, ...]) -> float:
    return sum(layer.scores[b] for layer, b in zip(layers, bits, strict=True))


def test_it_is_the_best_of_all_choices() -> None:
    layers = group(6, (2, 4, 8))
    found = allocate_group(layers, 4.0, 0.3)
    every = [c for c in product((2, 4, 8), repeat=6) if abs(mean(layers, c) - 4.0) <= 0.3]
    assert found in every and score(layers, found) == pytest.approx(max(score(layers, c) for c in every), rel=1e-9)


def test_budgets_are_met_and_a_tighter_one_is_never_better() -> None:
    """The specification's test 2."""
    layers, best = group(120, (2, 4, 8)), []
    for budget in (2.5, 3.0, 3.66, 4.0, 5.0, 7.5):
        found = allocate_group(layers, budget)
        assert abs(mean(layers, found) - budget) <= TOLERANCE + 1e-9
        best.append(score(layers, found))
    assert best == sorted(best)


def test_the_coupling_is_the_papers() -> None:
    for budget, sizes, ratio in product((3.7, 4.0, 5.0), (0.5, 2.2), (0.46, 0.66, 1.36)):
        first, second = coupled_budgets(budget, sizes, ratio)
        assert first == pytest.approx(ratio * second)
        assert (sizes * first + second) / (sizes + 1) == pytest.approx(budget)  # of both groups together


def test_candidates_of_a_large_model() -> None:
    """Shapes like the shipped logs' (420 and 374 entries, the first group of 2, 4 and 8 bits)."""
    first, second = group(420, (2, 4, 8), 1), group(374, (4, 8), 2)
    (only,) = candidates(first, second, 4.02, [4.0], [0.9])
    share = sum(layer.size for layer in first) / sum(layer.size for layer in second)
    for layers, bits, budget in zip(
        (first, second), (only.first, only.second), coupled_budgets(4.0, share, 0.9), strict=True
    ):
        assert abs(mean(layers, bits) - budget) <= TOLERANCE + 1e-9
    assert only.mean == pytest.approx(4.0, abs=TOLERANCE) and set(only.first) == {2, 4, 8}


def test_candidates_are_distinct_within_the_target_and_nearest_first() -> None:
    first, second = group(30, (2, 4, 8), 1), group(20, (4, 8), 2)
    found = candidates(first, second, 5.0, np.linspace(4.7, 5.0, 4).tolist(), np.linspace(0.46, 1.36, 5).tolist())
    assert len({(a.first, a.second) for a in found}) == len(found) > 5
    assert all(allocation.mean <= 5.0 for allocation in found)
    assert [a.mean for a in found] == sorted((a.mean for a in found), reverse=True)
    assert all(mean(second, a.second) >= 4 and abs(a.mean - a.budget) <= TOLERANCE for a in found)


def test_one_group_alone_has_the_whole_budget() -> None:
    layers = group(20, (2, 4, 8))
    for first, second in ((layers, []), ([], layers)):
        (found,) = candidates(first, second, 4.1, [4.0], [0.5, 1.0])
        assert abs(found.mean - 4.0) <= TOLERANCE and found.ratio == 1


def test_what_cannot_be_met_is_refused_with_what_can() -> None:
    layers = group(10, (4, 8))
    assert reachable(layers) == (4.0, 8.0)
    with pytest.raises(AllocationError, match="mean of 3 bits cannot be reached: the candidates allow 4 to 8 bits"):
        allocate_group(layers, 3.0)
    with pytest.raises(AllocationError, match=r"no allocation of 3 bits .* allow 4 to 8 bits, the first group 4 to 8"):
        candidates(layers, layers, 3.0, [2.9, 3.0], [0.5, 1.0])
    lone = [ScoredLayer(100, {2: 0.0, 8: 1.0})]
    with pytest.raises(AllocationError, match=r"no choice of bits has a mean within 0.02 of 5: 1 layers allow 2 to 8"):
        allocate_group(lone, 5.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        allocate_group([ScoredLayer(1, {4: float("nan")})], 4.0)
    with pytest.raises(ValueError, match="at least one candidate"):
        allocate_group([ScoredLayer(1, {})], 4.0)
    assert allocate_group([], 4.0) == ()
