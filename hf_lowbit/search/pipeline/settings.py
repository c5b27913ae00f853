"""What a search over a pipeline is asked for, checked before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowbit.config import ConfigError
from hf_lowbit.suggestion import unknown

OBJECTIVES = {
    "score": "the sum of scores, as in the paper",
    "noise": "the power of the noise that quality layers add, which adds up where decibels do not",
}


@dataclass(frozen=True)
class Settings:
    """Arguments of :func:`hf_lowbit.search_pipeline` that it has defaults for.

    Raises:
        ConfigError: values that cannot be.
    """

    steps: int
    bits_per_weight: float
    bits_per_input: float | None
    candidates: Sequence[int]
    input_candidates: Sequence[int]
    objective: str
    protect: float
    pictures: int
    samples: int
    scan: tuple[int, int]
    seed: int

    def __post_init__(self) -> None:
        for name, most in (("candidates", 8), ("input_candidates", 8)):
            values = getattr(self, name)
            if not values or any(type(bits) is not int or not 1 <= bits <= most for bits in values):
                raise ConfigError(f"{name} must be a list of bits such as (2, 4, 8), not {values!r}")
        for name in ("steps", "pictures", "samples"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if (
            not isinstance(self.scan, tuple | list)
            or len(self.scan) != 2
            or any(type(count) is not int or count < 1 for count in self.scan)
        ):
            raise ConfigError(f"scan must be how many budgets and how many ratios are tried, not {self.scan!r}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(unknown("objective", self.objective, OBJECTIVES))
        if not 0 <= self.protect < 1:
            raise ConfigError(f"protect must be a share of the layers, from 0 to below 1, not {self.protect!r}")
        for name in ("bits_per_weight", "bits_per_input"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
