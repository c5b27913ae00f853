"""What a search found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_lowbit.config import LowbitConfig


@dataclass(frozen=True)
class GroupChoice:
    """Layers that share their bits.

    Attributes:
        layers: their names.
        bits: what was chosen.
        fixed: whether the config's own overrides left no choice.
        elements: weights in them.
        stored_bits: codes, scales, zero points, tables and low-rank factors.
        loss: at these bits.
        losses: bits -> loss, of every candidate; at the lowest ranks, where ranks were searched.
        ranks: layer -> what was chosen, where ranks were searched.
    """

    layers: tuple[str, ...]
    bits: int
    fixed: bool
    elements: int
    stored_bits: int
    loss: float
    losses: dict[int, float]
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: the given one, with the bits, and the ranks, as overrides.
        metric: of :data:`METRICS`.
        budget: in bits per weight.
        groups: in the order of the model.
        notes: layer -> why its loss could not be measured on its inputs.
    """

    config: LowbitConfig
    metric: str
    budget: float
    groups: list[GroupChoice]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """What is stored for the quantized layers, over their weights: what a report of the result will say."""
        return sum(group.stored_bits for group in self.groups) / sum(group.elements for group in self.groups)

    @property
    def loss(self) -> float:
        """Sum over groups."""
        return sum(group.loss for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        values = {"metric": self.metric, "budget": self.budget, "bits_per_weight": self.bits_per_weight}
        groups = [asdict(group) for group in self.groups]
        return {**values, "loss": self.loss, "groups": groups, "notes": self.notes, "config": self.config.to_dict()}
