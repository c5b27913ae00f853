"""Sizes of a mixer, and clusters of its heads and channels as scales are expanded over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Sizes.

    Attributes:
        heads: H; of generation 1 every channel is a head of its own.
        head_dim: P, channels per head.
        groups: G state groups, each with a B and a C that heads / groups heads share.
        state: n numbers per channel.
        taps: of the convolution.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int

    @property
    def intermediate(self) -> int:
        """e, the channels that are scanned."""
        return self.heads * self.head_dim

    @property
    def heads_per_group(self) -> int:
        """Heads that read one state group."""
        return self.heads // self.groups


def channel_clusters(head_ends: Tensor, channel_ends: Tensor, geometry: Geometry) -> Tensor:
    """The cluster of each channel, int64 ``[H * P]``: a row of scales ``[G, m, c, ...]`` flattened to ``[G*m*c, ...]``.

    Args:
        head_ends: ``[G, m]``, where each cluster of heads ends within its state group; the last is heads per group.
        channel_ends: ``[G, m, c]``, where each cluster of channels ends within a head; the last is P.
    """
    groups, _, clusters = channel_ends.shape
    head = torch.arange(geometry.heads_per_group, device=head_ends.device)
    own = (head[:, None] >= head_ends[:, None, :]).sum(-1)  # [G, heads per group], the cluster of each head
    group = torch.arange(groups, device=own.device)[:, None]
    channel = torch.arange(geometry.head_dim, device=own.device)
    within = (channel[:, None] >= channel_ends[group, own][:, :, None, :]).sum(-1)  # [G, heads per group, P]
    first = (group * head_ends.shape[1] + own) * clusters
    return (first[..., None] + within).flatten()


def ends_problem(ends: Tensor, last: int) -> str | None:
    """What is wrong with ends of clusters ``[..., clusters]`` of ``last`` things; None if nothing is."""
    steps = torch.diff(ends, prepend=torch.zeros_like(ends[..., :1]))
    if bool((steps < 1).any()) or bool((ends[..., -1] != last).any()):
        return f"must ascend from at least 1 to {last}, not {ends.tolist()}"
    return None
