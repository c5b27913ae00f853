"""MixerSpec: how a state-space mixer computes between its projections, as plain data that goes into the plan."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hf_lowbit.formats.spec import SpecError, spec_from_dict


@dataclass(frozen=True)
class MixerSpec:
    """What is quantized between the projections of a mixer, whose weights have specifications of their own.

    Attributes:
        activation_bits: 8: the values at every site (:meth:`hf_lowbit.nn.PackedMixer.sites`) are int8 codes with stored
            scales, and so are the last inputs of the convolution in the cache. None: floats.
        state_bits: 8: the state in the cache is int8 codes, too; None: float32.
        group_scales: of generation 2: B and C have a scale for each state group (Quamba2, arXiv 2503.22879, 4.3).
        head_clusters, channel_clusters: of generation 2: within each state group, x and the state have a scale for each
            of so many clusters of heads and, in these, of channels (Quamba2, 4.2); both or neither.
        channel_states: of generation 1: the state has a scale for each channel [ours].
    """

    activation_bits: int | None = None
    state_bits: int | None = None
    group_scales: bool = False
    head_clusters: int | None = None
    channel_clusters: int | None = None
    channel_states: bool = False

    def __post_init__(self) -> None:
        for name in ("activation_bits", "state_bits"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value != 8):
                raise SpecError(f"a mixer's {name} must be 8 or None, not {value!r}")
        for name in ("group_scales", "channel_states"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name} must be True or False, not {getattr(self, name)!r}")
        clusters = (self.head_clusters, self.channel_clusters)
        if any(value is not None and (type(value) is not int or value < 1) for value in clusters):
            raise SpecError(f"head_clusters and channel_clusters must be positive integers or None, not {clusters}")
        if (self.head_clusters is None) != (self.channel_clusters is None):
            raise SpecError(f"head_clusters and channel_clusters are given together, not {clusters}")
        if self.activation_bits is None:
            needing = {"state_bits": self.state_bits, "group_scales": self.group_scales, "head_clusters": clusters[0]}
            if given := [name for name, value in needing.items() if value]:
                raise SpecError(f"a mixer's {', '.join(given)} need activation_bits=8")
        if self.channel_states and self.state_bits is None:
            raise SpecError("a mixer's channel_states need state_bits=8")

    @property
    def clusters(self) -> tuple[int, int] | None:
        """Clusters of heads in a state group and of channels in one of these; None without."""
        if self.head_clusters is None or self.channel_clusters is None:
            return None
        return self.head_clusters, self.channel_clusters

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what differs from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MixerSpec:
        """Inverse of :meth:`to_dict`. Raises SpecError for unknown fields."""
        if not isinstance(values, dict):
            raise SpecError(f"a mixer's specification is an object, not {values!r}")
        spec: MixerSpec = spec_from_dict(cls, values)
        return spec
