"""Ranks of low-rank branches from a budget: ``LowRankConfig(budget_bits=...)``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_lowbit.config import LowbitConfig
from hf_lowbit.search.program import search

_STEPS = 8  # ranks to choose from, besides 0
_SEARCHED = 4  # batches that losses are measured on


def choose_ranks(model: nn.Module, config: LowbitConfig, batches: Sequence[dict[str, Any]]) -> str:
    """Give the config the rank of every layer as overrides; a line for the report.

    Eighths of ``low_rank.rank`` are chosen from, by the same integer program that chooses bits: the error of a layer's
    output that each rank leaves, in units of what it does to its block (metric "hessian" of
    :func:`hf_lowbit.search.search`), against the bits that it stores. Weights are rounded to nearest for it, whatever
    the method [ours].

    Args:
        model: float, after all that rewrites it as a whole.
        config: with ``low_rank.budget_bits``; ranks that its overrides give are kept.
        batches: keyword arguments of the model's forward.

    Raises:
        AllocationError: a budget that the weights alone exceed; it names both.
    """
    part = config.low_rank
    assert part is not None and part.budget_bits is not None
    ranks = sorted({round(part.rank * step / _STEPS) for step in range(_STEPS + 1)})
    result = search(
        model, on_batches(config, batches), None, part.budget_bits, [config.bits or 0], ranks=ranks, allows_less=True
    )
    config.overrides = result.config.overrides
    layers = Counter(rank for group in result.groups for rank in group.ranks.values())
    shares = ", ".join(f"{layers[rank]} with rank {rank}" for rank in sorted(layers))
    return (
        f"low rank: of {sum(layers.values())} layers {shares}: {result.bits_per_weight:.3f} bits per weight of at most "
        f"{part.budget_bits:g}, chosen by each layer's second-order loss"
    )


def on_batches(config: LowbitConfig, batches: Sequence[dict[str, Any]], most: int = _SEARCHED) -> LowbitConfig:
    """The config with a few of the batches at hand, at most ``most``, as all of its data."""
    data = list(batches[:most])
    asked = config.copy_with_data(data)
    asked.num_samples = sum(max(len(value) for value in batch.values() if isinstance(value, Tensor)) for batch in data)
    return asked
