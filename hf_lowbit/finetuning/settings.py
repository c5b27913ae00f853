"""What a fine-tuning run is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_lowbit.config import ConfigError

_COUNTS = ("rank", "epochs", "batch_size", "accumulation", "max_length")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Settings of one run; the learning rate is that of QLoRA (arXiv 2305.14314, appendix B), the rest is ours.

    Attributes:
        rank: of a new adapter; one that comes from a compensation keeps its own.
        alpha: its output is scaled by alpha / rank; None: 2 * rank.
        targets: modules that get a new adapter, as PEFT takes them.
        steps: of the optimizer; None: as many as ``epochs`` passes over the data take.
        learning_rate: of AdamW, its peak: 3 % of the steps rise to it, then it falls linearly to 0.
        batch_size, accumulation: samples of a forward, and forwards of a step.
        max_length: tokens of a sample, at most.
        held_out: part of the samples that is not trained on, at most 64 of them.
        gradient_checkpointing: compute activations twice instead of keeping them.
        seed: of the adapter, the held-out part and the order of the samples.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    steps: int | None = None
    epochs: int = 1
    learning_rate: float = 2e-4
    batch_size: int = 4
    accumulation: int = 1
    max_length: int = 512
    held_out: float = 0.05
    gradient_checkpointing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*_COUNTS, *(() if self.steps is None else ("steps",))):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if self.max_length < 2:
            raise ConfigError("max_length must be at least 2: a token is predicted from the one before")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate must lie between 0 and 1, not {self.learning_rate!r}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, not {self.held_out!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"alpha must be positive, not {self.alpha!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
