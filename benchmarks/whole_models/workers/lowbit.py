"""SmolLM2 as floats and packed by hf_lowbit."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from whole_models.workers.language import measure_language
from whole_models.workers.native import native_library
from whole_models.workers.protocol import Job, serve


def arguments(job: Job) -> dict[str, Any]:
    """Of `from_pretrained`; hf_lowbit is imported only where it is used."""
    if "config" in job.options:
        import hf_lowbit  # noqa: F401
    return {"dtype": getattr(torch, job.options["dtype"])}


def prepare(job: Job) -> None:
    """Quantize, and save."""
    values = arguments(job)
    if "config" in job.options:
        from hf_lowbit import RTNConfig

        values["quantization_config"] = RTNConfig(**job.options["config"])
    AutoModelForCausalLM.from_pretrained(job.source, **values).save_pretrained(job.folder)


def load(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.folder, **arguments(job))


def measure(job: Job) -> dict[str, Any]:
    build = {"native_library": native_library()} if "config" in job.options else {}
    return {**measure_language(job, load), **build}


if __name__ == "__main__":
    serve(prepare, measure)
