"""Clusters of heads and channels, expanded to channels."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.nn.state_space.geometry import Geometry, channel_clusters, ends_problem


def test_clusters_are_rectangles_of_heads_and_channels() -> None:
    """By the definition, head by head and channel by channel (Quamba2's test 4)."""
    geometry = Geometry(heads=10, head_dim=6, groups=2, state=4, taps=4)
    head_ends = torch.tensor([[2, 5], [4, 5]])
    channel_ends = torch.tensor([[[1, 4, 6], [2, 3, 6]], [[4, 5, 6], [1, 2, 6]]])
    expected = []
    for head in range(10):
        group, own = divmod(head, 5)
        cluster = 0 if own < head_ends[group, 0] else 1
        for channel in range(6):
            within = sum(int(channel >= end) for end in channel_ends[group, cluster])
            expected.append((group * 2 + cluster) * 3 + within)
    found = channel_clusters(head_ends, channel_ends, geometry)
    assert found.tolist() == expected
    assert sorted(set(expected)) == list(range(12))  # none of them is empty


def test_one_cluster_is_a_state_group() -> None:
    geometry = Geometry(heads=4, head_dim=3, groups=2, state=4, taps=4)
    found = channel_clusters(torch.tensor([[2], [2]]), torch.tensor([[[3]], [[3]]]), geometry)
    assert found.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("ends", [[0, 4], [3, 3, 4], [2, 5], [3, 2, 4]])
def test_ends_that_cannot_be(ends: list[int]) -> None:
    assert ends_problem(torch.tensor([1, 2, 4]), 4) is None
    assert ends_problem(torch.tensor(ends), 4) is not None
