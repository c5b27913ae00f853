"""Sorting and clustering the heads and channels of a Mamba-2 mixer, so that few scales serve them (Quamba2).

Quamba2 (Chiang et al., arXiv 2503.22879, section 4): the state space model works channel by channel, so that channels
of x may change places if everything that is written and read by place does too; which channels are large persists over
time and inputs. Within every state group heads with alike channels are put side by side, in every head its channels
are sorted, and each rectangle of heads and channels that results gets one scale.

Channels are clustered by the contiguous partition of the sorted ones with the least sum of squares, found exactly by
dynamic programming [ours: the authors run K-means, whose clusters need not be contiguous]; it is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

Partition = Callable[[Tensor, int], Tensor]
_ROUNDS = 300  # of K-means


class ReorderError(ValueError):
    """Heads or channels that cannot be clustered as asked, or a mixer that cannot be reordered."""


class Reordering(NamedTuple):
    """The new order of a mixer's heads and channels, and its clusters in that order.

    Attributes:
        heads: int64 ``[H]``, the head that each new place takes; heads stay in their state group.
        channels: int64 ``[H * P]``, the channel that each new place takes; channels stay in their head.
        head_ends: int32 ``[G, m]``, where each cluster of heads ends in its group; the last is H / G.
        channel_ends: int32 ``[G, m, c]``, where each cluster of channels ends in a head; the last is P.
    """

    heads: Tensor
    channels: Tensor
    head_ends: Tensor
    channel_ends: Tensor

    def convolution(self, states: int) -> Tensor:
        """The order of the convolution's channels x | B | C, int64; B and C have ``states`` channels together."""
        return torch.cat([self.channels, len(self.channels) + torch.arange(states)])

    def projection(self, states: int) -> Tensor:
        """The order of the rows of in_proj, z | x | B | C | dt."""
        width = len(self.channels)
        return torch.cat([self.channels, width + self.convolution(states), 2 * width + states + self.heads])


def sort_and_cluster(
    magnitude: Tensor, groups: int, head_clusters: int, channel_clusters: int, partition: Partition | None = None
) -> Reordering:
    """Order and clusters from the magnitudes of x.

    For every state group: the sorted magnitudes of each head, as a vector of length one, are clustered by Ward's
    criterion; the heads of one cluster sit side by side; and so do the channels of one cluster of their places in the
    sorted order, points with one coordinate per head.

    Args:
        magnitude: of every channel after convolution and SiLU, float ``[H, P]``.
        groups: G, state groups.
        head_clusters: m, of each group.
        channel_clusters: c, of each cluster of heads.
        partition: of sorted points; None: :func:`optimal_partition`.

    Raises:
        ReorderError: more clusters than heads or channels, groups that do not divide the heads, magnitudes that are
            not finite, or K-means that fails.
    """
    heads, width = magnitude.shape
    size = heads // groups
    if heads % groups or not 1 <= head_clusters <= size or not 1 <= channel_clusters <= width:
        raise ReorderError(
            f"{head_clusters} clusters of heads and {channel_clusters} of channels do not fit {heads} heads of {width} "
            f"channels in {groups} state groups"
        )
    if not bool(torch.isfinite(magnitude).all()):
        raise ReorderError("the magnitudes of x hold NaN or infinite values")
    partition = partition or optimal_partition
    ascending, order = magnitude.double().sort(dim=-1, stable=True)
    unit = ascending / ascending.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    chosen: list[Tensor] = []
    head_ends, channel_ends = [], []
    for group in unit.split(size):
        labels = ward_clusters(group, head_clusters)
        members = [(labels == label).nonzero().flatten() for label in range(head_clusters)]
        chosen.append(torch.cat(members) + size * len(chosen))
        head_ends.append(torch.tensor([len(own) for own in members]).cumsum(0))
        channel_ends.append(torch.stack([partition(group[own].t(), channel_clusters) for own in members]))
    new = torch.cat(chosen)
    channels = (new[:, None] * width + order[new]).flatten()
    return Reordering(new, channels, torch.stack(head_ends).int(), torch.stack(channel_ends).int())


def ward_clusters(points: Tensor, clusters: int) -> Tensor:
    """Agglomerative clustering by Ward's criterion: int64 ``[N]`` labels, in the order of first appearance.

    Args:
        points: float64 ``[N, dimensions]``.
    """
    if len(points) == clusters:
        return torch.arange(clusters)
    labels = cut_tree(linkage(points.numpy(), method="ward"), n_clusters=clusters)
    return torch.from_numpy(labels[:, 0]).long()


def optimal_partition(points: Tensor, clusters: int) -> Tensor:
    """The contiguous partition of ordered points with the least sum of squared distances to the clusters' means.

    Exact, by dynamic programming in ``clusters * N^2`` steps; every cluster has a point.

    Args:
        points: float64 ``[N, dimensions]``.

    Returns:
        Where each cluster ends, int64 ``[clusters]``, ascending.
    """
    count = len(points)
    cost = _segment_costs(points)
    best, starts = cost[0], []
    for _ in range(clusters - 1):
        best, start = (best[:, None] + cost).min(0)  # over where the last cluster starts
        starts.append(start)
    ends = [count]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return torch.tensor(ends[::-1])


def kmeans_partition(points: Tensor, clusters: int) -> Tensor:
    """The same by K-means from the points 0, N/c, 2N/c, ..., as the authors have it.

    Raises:
        ReorderError: a cluster is empty, or not contiguous.
    """
    count = len(points)
    centres = points[torch.arange(clusters) * count // clusters]
    labels = torch.full((count,), -1)
    for _ in range(_ROUNDS):
        distance = (points[:, None] - centres).square().sum(-1)
        before, labels = labels, distance.argmin(1)
        if torch.equal(before, labels):
            break
        members = torch.nn.functional.one_hot(labels, clusters).double()
        counts = members.sum(0)
        centres = torch.where(counts[:, None] > 0, members.t() @ points / counts.clamp(min=1)[:, None], centres)
    sizes = torch.bincount(labels, minlength=clusters)
    if bool((sizes == 0).any()) or bool((labels.diff() < 0).any()):
        raise ReorderError("K-means left a cluster of channels empty or torn; use clustering='optimal'")
    return sizes.cumsum(0)


def _segment_costs(points: Tensor) -> Tensor:
    """Sum of squares around the mean of points i to j - 1, ``[N + 1, N + 1]`` at i, j; infinite where i >= j."""
    zero = points.new_zeros(1, points.shape[1])
    sums = torch.cat([zero, points.cumsum(0)])
    squares = torch.cat([zero, points.square().cumsum(0)]).sum(1)
    places = torch.arange(len(points) + 1)
    length = (places[None] - places[:, None]).clamp(min=1)
    within = squares[None] - squares[:, None] - (sums[None] - sums[:, None]).square().sum(-1) / length
    return within.clamp(min=0).masked_fill(places[:, None] >= places[None], torch.inf)
