"""What a search over a pipeline found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_lowbit.config import LowbitConfig

FULL = 16  # bits that inputs in full precision count


@dataclass(frozen=True)
class LayerChoice:
    """One layer.

    Attributes:
        name: in the denoiser.
        group: "content" or "quality".
        elements, inputs: weights in it, and values that it reads of one sample.
        bits: of its weights.
        input_bits: of its inputs; None: full precision.
        protected: in full precision because it is among the most sensitive of its group.
        weight_scores, input_scores: bits -> SSIM (content) or SQNR in dB (quality), with this layer alone rounded.
    """

    name: str
    group: str
    elements: int
    inputs: int
    bits: int
    input_bits: int | None
    protected: bool = False
    weight_scores: dict[int, float] = field(default_factory=dict)
    input_scores: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """An allocation whose pictures were drawn.

    Attributes:
        what: "weights" or "inputs"; inputs with the chosen weights.
        budget, ratio: see :class:`hf_lowbit.allocation.coupled_groups.Allocation`.
        mean: bits.
        pixel_error: mean squared difference to the float pipeline's pictures.
    """

    what: str
    budget: float
    ratio: float
    mean: float
    pixel_error: float


@dataclass(frozen=True)
class PipelineSearchResult:
    """What a search over a pipeline found.

    Attributes:
        config: the given one, with bits of weights and inputs of every layer as overrides.
        component: of the pipeline.
        budget: mean bits of the weights' codes, as asked.
        layers: in the order of the model.
        candidates: in the order in which they were drawn; empty where there was no choice.
        notes: what is not as it was asked for.
    """

    config: LowbitConfig
    component: str
    budget: float
    layers: list[LayerChoice]
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)

    @property
    def mean_bits(self) -> float:
        """Of the weights' codes, without scales."""
        return sum(layer.bits * layer.elements for layer in self.layers) / sum(layer.elements for layer in self.layers)

    @property
    def mean_input_bits(self) -> float:
        """Of the inputs of all layers, those in full precision with 16."""
        read = [layer for layer in self.layers if layer.inputs]
        total = sum(layer.inputs for layer in read)
        return sum((layer.input_bits or FULL) * layer.inputs for layer in read) / total if total else float(FULL)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        values = {"component": self.component, "budget": self.budget}
        means = {"mean_bits": self.mean_bits, "mean_input_bits": self.mean_input_bits}
        layers = [asdict(layer) for layer in self.layers]
        drawn = [asdict(candidate) for candidate in self.candidates]
        config = self.config.to_dict()
        return {**values, **means, "layers": layers, "candidates": drawn, "notes": self.notes, "config": config}
