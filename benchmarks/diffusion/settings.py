"""What one run asks of every row, as plain data that goes to a process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[2] / "tests" / "assets"
PIPELINES = {"sd": ASSETS / "sd-fashion", "dit": ASSETS / "dit-fashion"}
CLASSIFIER = ASSETS / "fashion-classifier"
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CALIBRATION_SEED = 1_000_000  # of trajectories: no picture that is measured starts from their noise


@dataclass(frozen=True)
class Settings:
    """Of a run. Where and how it runs (``work`` to ``save``) does not change what a row is.

    Attributes:
        pipeline: "sd", "dit", or a folder.
        images, steps: of what is measured; steps also of the trajectories.
        calibration: pictures whose trajectories are recorded.
        timesteps: how many of their steps are.
        iterations: of learned rounding in each block; None for the methods' own.
        quick: train and search next to nothing.
        save: keep the quantized pipelines in ``work``.
    """

    pipeline: str
    images: int
    steps: int
    calibration: int
    timesteps: int | None
    iterations: int | None
    quick: bool
    work: str
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 64
    save: bool = False

    @property
    def source(self) -> Path:
        """The pipeline's folder."""
        return PIPELINES.get(self.pipeline, Path(self.pipeline))

    @property
    def identity(self) -> dict[str, Any]:
        """What rows have in common that may be compared."""
        names = ("images", "steps", "calibration", "timesteps", "iterations", "quick")
        return {"pipeline": self.source.name, **{name: getattr(self, name) for name in names}}

    @property
    def folder(self) -> Path:
        """Of pictures, measurements and logs, in ``work``: settings that differ share nothing."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return Path(self.work) / f"{self.source.name}-{digest[:8]}"

    def to_json(self) -> str:
        """For a process."""
        return json.dumps(asdict(self))


def prompts_of(classes: bool, count: int) -> list[Any]:
    """The labels in turn: as classes, or in words."""
    if classes:
        return [index % len(LABELS) for index in range(count)]
    return [f"a photo of {_with_article(LABELS[index % len(LABELS)])}" for index in range(count)]


def calibration_prompts(classes: bool) -> list[Any]:
    """Each label once, in words that are not those of the measured pictures."""
    if classes:
        return list(range(len(LABELS)))
    ways = ("a grayscale photo of {}", "{} on a black background", "an image of {}", "a product photo of {} for sale")
    return [ways[index % len(ways)].format(_with_article(label)) for index, label in enumerate(LABELS)]


def _with_article(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
