"""English prose for calibration and for evaluation, installed with this package (see ``data/ATTRIBUTION.md``)."""

from __future__ import annotations

from importlib import resources


def validation_text() -> str:
    """Held-out prose, 113 kB, about 25k tokens of SmolLM2: for perplexity and divergence, never for calibration."""
    return _read("validation.txt")


def calibration_text() -> str:
    """Prose to calibrate on, 297 kB, about 64k tokens of SmolLM2, from other chapters than `validation_text`."""
    return _read("calibration.txt")


def two_cities_transcript() -> str:
    """What the recording ``two_cities`` of `hf_lowbit.testbed.speech` says (Charles Dickens, public domain)."""
    return _read("two_cities.txt").strip()


def _read(name: str) -> str:
    return (resources.files("hf_lowbit.testbed") / "data" / name).read_text(encoding="utf-8")
