"""Channel reassembly: split channels with outliers, merge as many similar ones, the width stays (QLLM).

QLLM (Liu et al., arXiv 2310.08041, section 4.1). A channel whose largest magnitude is m becomes T = ceil(m / threshold)
copies of 1/T each, so that no copy exceeds the threshold: exact. As many other channels as copies were added are then
merged into their most similar ones by bipartite soft matching (the copies at even places look for a partner at odd
ones): a cluster's input is the mean of its channels', its weight column the sum of theirs.

The score is the exact error of a merge, ||(x_i - x_j)/2 (w_i - w_j)^T||_F^2 = 1/4 ||x_i - x_j||^2 ||w_i - w_j||^2
[ours: the authors' code sums the columns of the weights, whose signs cancel]. Where several channels join one target it
is that of each with the target alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST_STEPS = 10_000  # of the walk down the thresholds: massive activations would make millions


class ReassemblyError(ValueError):
    """Channels that cannot be reassembled as asked."""


class Assignment(NamedTuple):
    """Which part of which channel goes where.

    Attributes:
        source: int32 ``[copies]``, the channel that each copy reads.
        target: int32 ``[copies]``, ascending, the new channel it becomes part of; each of them has at least one.
        factor: float32 ``[copies]``, 1 / (copies of the source * copies in the target).
    """

    source: Tensor
    target: Tensor
    factor: Tensor


def split_counts(largest: Tensor, threshold: float) -> Tensor:
    """T = max(1, ceil(m / threshold)), int64 ``[channels]``.

    Args:
        largest: m = max |x| of every channel, ``[channels]``.

    Raises:
        ReassemblyError: a threshold that is not positive, or magnitudes that are not finite.
    """
    if not threshold > 0:
        raise ReassemblyError(f"the threshold must be positive, not {threshold}")
    if not bool(torch.isfinite(largest).all()):
        raise ReassemblyError("the inputs hold NaN or infinite values")
    return (largest.double() / threshold).ceil().clamp(min=1).long()


def disassemble(x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Split channels without merging any: the product stays what it was.

    Args:
        x: ``[..., channels]``.
        weight: ``[rows, channels]``.
        counts: T, int64 ``[channels]``.

    Returns:
        Inputs ``[..., sum T]``, each copy 1/T of its channel, and the weight with its columns repeated.
    """
    copies = x.repeat_interleave(counts, -1) / counts.repeat_interleave(counts).to(x.dtype)
    return copies, weight.repeat_interleave(counts, -1)


def pair_errors(inputs: Tensor, weights: Tensor) -> Tensor:
    """The error of merging each pair of channels, ``[channels, channels]``.

    Args:
        inputs: X^T X over tokens, or its mean, ``[channels, channels]``.
        weights: W^T W over the rows of every weight that reads the inputs, ``[channels, channels]``.
    """
    return _distances(inputs).mul_(_distances(weights)).mul_(0.25)


def _distances(gram: Tensor) -> Tensor:
    """||a_i - a_j||^2 from the products of all columns."""
    power = gram.diagonal()
    return (power[:, None] + power[None, :]).sub_(gram, alpha=2).clamp_(min=0)


def assign(counts: Tensor, errors: Tensor) -> Assignment:
    """Merge as many channels as splitting added; copies of split channels are never merged.

    Args:
        counts: T, int64 ``[channels]``.
        errors: of merging each pair, ``[channels, channels]`` (:func:`pair_errors`).

    Raises:
        ReassemblyError: too few channels are left to merge.
    """
    channel = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    split = counts[channel] > 1
    copies, extra = len(channel), len(channel) - len(counts)
    best, partner = _partners(channel, split, errors)
    chosen = best.sort(stable=True).indices[:extra]
    if len(chosen) < extra or not bool(torch.isfinite(best[chosen]).all()):
        raise ReassemblyError(
            f"{extra} channels would have to be merged, and too few are left: take a higher threshold"
        )
    owner = torch.arange(copies, device=counts.device)
    owner[2 * chosen] = 2 * partner[chosen] + 1
    remains = torch.ones(copies, dtype=torch.bool, device=counts.device)
    remains[2 * chosen] = False
    target = (remains.cumsum(0) - 1)[owner]
    factor = 1.0 / (counts[channel] * torch.bincount(target)[target])
    order = target.sort(stable=True).indices
    return Assignment(channel[order].int(), target[order].int(), factor[order].float())


def _partners(channel: Tensor, split: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """For every even place the least error of merging it into an odd one, and which of these."""
    even, odd = slice(0, None, 2), slice(1, None, 2)
    table = errors.index_select(0, channel[even]).index_select(1, channel[odd])
    table[split[even]] = float("inf")
    table[:, split[odd]] = float("inf")
    if not table.shape[1]:
        return table.new_zeros(0), channel.new_zeros(0)
    best, partner = table.min(1)
    return best, partner


def candidates(largest: Tensor, ratio: float, most: int) -> list[Tensor]:
    """The splits worth trying: counts T ``[channels]`` for falling thresholds, each with more copies than the last.

    Thresholds fall from the largest to the least magnitude in at least 100 steps, as in the authors' code, and stop
    where the added copies exceed ``ratio`` of the channels. Of more than ``most`` splits, ``most`` evenly spread ones
    are taken [ours]. The split that splits nothing is not among them.

    Raises:
        ReassemblyError: magnitudes that are not finite.
    """
    if not bool(torch.isfinite(largest).all()):
        raise ReassemblyError("the inputs hold NaN or infinite values")
    high, low = float(largest.max()), float(largest.min())
    steps = min(max(100, int(high / 0.5)), _MOST_STEPS)
    found: list[Tensor] = []
    before = 0
    for step in range(1, steps + 1):
        threshold = high - step * (high - low) / steps
        if threshold <= 0 or high == low:
            break
        counts = split_counts(largest, threshold)
        extra = int(counts.sum()) - len(counts)
        if extra > int(ratio * len(counts)):
            break
        if extra != before:
            found.append(counts)
        before = extra
    if len(found) <= most:
        return found
    places = torch.linspace(0, len(found) - 1, most).round().long().tolist()
    return [found[place] for place in dict.fromkeys(places)]
