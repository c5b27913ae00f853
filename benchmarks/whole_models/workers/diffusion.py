"""The two small trained pipelines, one picture at a time, with a float or packed denoiser."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

import hf_lowbit
from whole_models.workers.native import native_library
from whole_models.workers.protocol import Job, memory, serve, size_mb, timed

PICTURES = 3


def load(folder: Any, **values: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **values)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prepare(job: Job) -> None:
    """options: denoiser, the component's name; config of RTNConfig, absent for float32."""
    values = {}
    if "config" in job.options:
        mapping = {job.options["denoiser"]: hf_lowbit.RTNConfig(**job.options["config"])}
        values["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    load(job.source, **values).save_pretrained(job.folder)


def draw(pipeline: Any, steps: int) -> float:
    """Seconds of one picture."""
    what: dict[str, Any] = {"class_labels": [9]}
    if hasattr(pipeline, "unet"):
        what = {"prompt": "a photo of an ankle boot", "height": 32, "width": 32}
    begun = time.perf_counter()
    pipeline(**what, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np")
    return time.perf_counter() - begun


def measure(job: Job) -> dict[str, Any]:
    """Seconds per picture of ``options["steps"]`` steps, the median of a few after one that warms up."""
    torch.set_num_threads(job.threads)
    steps = job.options["steps"]
    result: dict[str, Any] = {"steps": steps, **memory("imported")}
    with timed(result, "load_s"):
        pipeline = load(job.folder)
    result.update(memory("loaded"))
    draw(pipeline, 2)
    result["picture_s"] = statistics.median(draw(pipeline, steps) for _ in range(PICTURES))
    if "config" in job.options:
        result["native_library"] = native_library()
    denoiser = size_mb(job.folder / job.options["denoiser"])
    return {**result, **memory("drawn"), "disk_mb": size_mb(job.folder), "denoiser_disk_mb": denoiser}


if __name__ == "__main__":
    serve(prepare, measure)
