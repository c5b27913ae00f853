"""What one run asks of every row, and the models that it asks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / "tests" / "assets"
TEXT = ASSETS / "debian-text"
TRAINED = {"mamba": ASSETS / "mamba-debian", "mamba2": ASSETS / "mamba2-debian"}
RANDOM = ("mamba-130m", "mamba2-130m")


def generation_of(model: str) -> int:
    """1 or 2."""
    return 2 if model.startswith("mamba2") else 1


@dataclass(frozen=True)
class Settings:
    """Of a run's quality.

    Attributes:
        model: one of :data:`TRAINED`.
        tokens: of the held-out text.
        length: of a window, BOS included.
        prompt: tokens of a window that are there before it is read token by token.
        samples: windows of the same length to calibrate on.
        seed: of those, and of methods.
    """

    model: str
    tokens: int = 16_384
    length: int = 512
    prompt: int = 64
    samples: int = 48
    seed: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What rows have in common that may be compared."""
        return asdict(self)
