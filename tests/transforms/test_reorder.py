"""Sort and cluster: the optimum against all partitions, the clusters' shapes, and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from hf_lowbit.transforms.reorder import (
    ReorderError,
    kmeans_partition,
    optimal_partition,
    sort_and_cluster,
    ward_clusters,
)

HEADS, WIDTH, GROUPS = 12, 16, 2


@pytest.fixture
def magnitude() -> Tensor:
    """Two families of heads in either group: one with a few large channels, one without."""
    torch.manual_seed(0)
    values = torch.rand(HEADS, WIDTH) + 0.5
    values[[1, 4, 5, 8, 11], :3] += 20
    return torch.stack([row[torch.randperm(WIDTH)] for row in values])


def spread(points: Tensor, ends: list[int]) -> float:
    """Sum of squares around the clusters' means."""
    parts = [points[start:end] for start, end in pairwise([0, *ends])]
    return float(sum((part - part.mean(0)).square().sum() for part in parts))


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 9])
def test_the_partition_is_the_best_of_all(clusters: int) -> None:
    torch.manual_seed(clusters)
    points = (torch.rand(9, 3, dtype=torch.float64) ** 4).sort(0).values
    everything = [[*inner, 9] for inner in combinations(range(1, 9), clusters - 1)]
    ends = optimal_partition(points, clusters).tolist()
    assert ends in everything
    assert spread(points, ends) == pytest.approx(min(spread(points, other) for other in everything))


def test_kmeans_is_no_better_and_as_good_on_clear_clusters() -> None:
    torch.manual_seed(0)
    points = (torch.rand(32, 4, dtype=torch.float64) ** 3).sort(0).values
    exact, found = optimal_partition(points, 4), kmeans_partition(points, 4)
    assert spread(points, exact.tolist()) <= spread(points, found.tolist()) + 1e-12
    steps = torch.tensor([0.0] * 8 + [10.0] * 4 + [30.0] * 2 + [90.0] * 2, dtype=torch.float64)[:, None]
    apart = steps + torch.linspace(0, 0.1, 16, dtype=torch.float64)[:, None]
    assert optimal_partition(apart, 4).tolist() == [8, 12, 14, 16]
    with pytest.raises(ReorderError, match="clustering='optimal'"):
        kmeans_partition(torch.zeros(8, 2, dtype=torch.float64), 4)


def test_heads_that_are_alike_are_found() -> None:
    points = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 1, 0]]
    assert ward_clusters(points, 3).tolist() == [0, 1, 0, 2, 1, 0]
    assert ward_clusters(torch.zeros(4, 2, dtype=torch.float64), 3).unique().numel() == 3, "even where all are alike"
    assert ward_clusters(points[:1], 1).tolist() == [0]


# 4
@pytest.mark.parametrize(("m", "c"), [(1, 1), (2, 4), (6, 16)])
def test_clusters_are_rectangles_of_permuted_channels(magnitude: Tensor, m: int, c: int) -> None:
    found = sort_and_cluster(magnitude, GROUPS, m, c)
    size = HEADS // GROUPS
    assert found.heads.view(GROUPS, size).sort(1).values.flatten().tolist() == list(range(HEADS)), "groups stay"
    assert found.channels.sort().values.tolist() == list(range(HEADS * WIDTH))
    assert torch.equal(found.channels.view(HEADS, WIDTH) // WIDTH, found.heads[:, None].expand(HEADS, WIDTH))
    ordered = magnitude.flatten()[found.channels].view(HEADS, WIDTH)
    assert bool((ordered.diff(dim=1) >= 0).all()), "channels ascend within their head"
    assert found.head_ends.shape == (GROUPS, m) and found.channel_ends.shape == (GROUPS, m, c)
    for ends, last in ((found.head_ends, size), (found.channel_ends, WIDTH)):
        assert ends.dtype == torch.int32 and bool((ends[..., -1] == last).all())
        assert bool((torch.cat([torch.zeros_like(ends[..., :1]), ends], -1).diff() > 0).all()), "none is empty"


def test_families_of_heads_are_told_apart(magnitude: Tensor) -> None:
    found = sort_and_cluster(magnitude, GROUPS, 2, 2)
    clusters = {
        frozenset(part.tolist())
        for heads, end in zip(found.heads.view(GROUPS, -1), found.head_ends[:, 0], strict=True)
        for part in (heads[:end], heads[end:])
    }
    assert clusters == {frozenset(own) for own in ({0, 2, 3}, {1, 4, 5}, {6, 7, 9, 10}, {8, 11})}
    sizes = sorted(found.channel_ends[:, :, 0].flatten().tolist())
    assert sizes[-2:] == [WIDTH - 3] * 2, "the three large channels are a cluster of their own"


def test_a_finer_partition_never_spreads_more(magnitude: Tensor) -> None:
    points = magnitude[:4].double().sort(1).values.t().contiguous()
    found = [spread(points, optimal_partition(points, clusters).tolist()) for clusters in range(1, WIDTH + 1)]
    assert all(more >= fewer for more, fewer in pairwise(found)) and found[-1] == pytest.approx(0)


def test_orders_of_rows_leave_states_in_their_places(magnitude: Tensor) -> None:
    found = sort_and_cluster(magnitude, GROUPS, 2, 2)
    width, states = HEADS * WIDTH, 10
    conv, rows = found.convolution(states), found.projection(states)
    assert torch.equal(conv[:width], found.channels) and conv[width:].tolist() == list(range(width, width + states))
    z, rest, dt = rows.split([width, width + states, HEADS])
    assert torch.equal(z, found.channels) and torch.equal(rest - width, conv)
    assert torch.equal(dt - 2 * width - states, found.heads)


@pytest.mark.parametrize(("groups", "m", "c"), [(5, 1, 1), (2, 7, 1), (2, 0, 1), (2, 1, 17), (2, 1, 0)])
def test_clusters_that_do_not_fit(magnitude: Tensor, groups: int, m: int, c: int) -> None:
    with pytest.raises(ReorderError, match=f"{m} clusters of heads and {c} of channels do not fit 12 heads of 16"):
        sort_and_cluster(magnitude, groups, m, c)


def test_values_that_are_not_finite(magnitude: Tensor) -> None:
    magnitude[0, 0] = float("nan")
    with pytest.raises(ReorderError, match="NaN"):
        sort_and_cluster(magnitude, GROUPS, 1, 1)
