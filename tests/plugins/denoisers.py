"""The two trained pipelines of the tests, what their denoisers are called with, and how near a quantized one comes."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.config import LowbitConfig

ASSETS = Path(__file__).parents[1] / "assets"
DENOISERS = {"sd-fashion": "unet", "dit-fashion": "transformer"}
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
Batch = dict[str, Tensor]


@cache
def pipeline_of(name: str) -> Any:
    """A trained pipeline in float32; nobody changes it."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / name, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def float_denoiser(name: str) -> Any:
    """A copy of its denoiser, to be quantized."""
    return copy.deepcopy(getattr(pipeline_of(name), DENOISERS[name])).eval()


@cache
def calls_of(name: str, seed: int = 0, steps: int = 4, samples: int = 4) -> list[Batch]:
    """The denoiser's arguments on a trajectory: a batch for each step, its samples conditional and unconditional."""
    pipeline, generator = pipeline_of(name), torch.Generator().manual_seed(seed)
    classes = [(seed + 3 * index) % len(NAMES) for index in range(samples)]
    what: dict[str, Any] = {"class_labels": classes}
    if name == "sd-fashion":
        what = {"prompt": [f"a photo of a {NAMES[index]}" for index in classes], "height": 32, "width": 32}
    denoiser, batches = getattr(pipeline, DENOISERS[name]), []
    parameters = ("sample",) if name == "sd-fashion" else ("hidden_states",)

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        named = dict(zip((*parameters, "timestep"), args, strict=False)) | kwargs
        (size,) = named[parameters[0]].shape[:1]
        named["timestep"] = torch.as_tensor(named["timestep"]).reshape(-1).expand(size)
        batches.append({key: value.clone() for key, value in named.items() if isinstance(value, Tensor)})

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline(**what, num_inference_steps=steps, generator=generator, output_type="latent")
    finally:
        handle.remove()
    return batches


def quantized(name: str, config: LowbitConfig, **recorded: int) -> Any:
    """The pipeline's denoiser, quantized on a trajectory."""
    data = calls_of(name, **recorded)
    config.num_samples = sum(len(batch["timestep"]) for batch in data)
    return hf_lowbit.quantize(float_denoiser(name), config, data=data)


@torch.no_grad()
def signal_to_noise(name: str, model: nn.Module, seed: int = 7) -> float:
    """Of the denoiser's output, in dB, on a trajectory that nothing was calibrated on."""
    reference, signal, noise = getattr(pipeline_of(name), DENOISERS[name]), 0.0, 0.0
    for batch in calls_of(name, seed):
        expected = reference(**batch, return_dict=False)[0]
        signal += float(expected.square().sum())
        noise += float((model(**batch, return_dict=False)[0] - expected).square().sum())
    return float(10 * torch.log10(torch.tensor(signal / noise)))
