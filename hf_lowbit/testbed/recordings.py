"""Three recordings of English speech, to measure word error rates with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hf_lowbit.testbed.cache import cached_folder
from hf_lowbit.testbed.wheel import Wheel, download_wheel, unpack

WHEEL = Wheel(
    name="moonshine-voice",
    version="0.1.5",
    sha256="1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496",
    size=19_897_307,
    platform="manylinux_2_34_x86_64",
)
RECORDINGS = ("beckett", "endgame_nagg_nell", "two_cities")


def speech() -> list[Path]:
    """Mono 16-bit WAV files of 10 s (16 kHz), 28 s (24 kHz) and 44 s (48 kHz), in the order of `RECORDINGS`.

    The text of ``two_cities`` is in the public domain (`two_cities_transcript`); the others are measured against a
    float model's transcript.

    Raises:
        FetchError: the package cannot be downloaded, or is not the expected one.
    """
    folder = cached_folder("speech", _build)
    return [folder / f"{name}.wav" for name in RECORDINGS]


def _build(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = download_wheel(WHEEL, Path(scratch))
        unpack(wheel, [f"moonshine_voice/assets/{name}.wav" for name in RECORDINGS], folder)
    return {
        "name": "speech",
        "source": WHEEL.origin,
        "sha256": WHEEL.sha256,
        "license": "mit",
        "note": "The package is MIT. The texts of beckett and endgame_nagg_nell are under copyright: measure with the "
        "recordings, do not redistribute them.",
    }
