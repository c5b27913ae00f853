"""SmolLM2 in qint4 by optimum-quanto: linear layers with the head (untied then); saved as state and map."""

from __future__ import annotations

import json
from typing import Any

import torch
from optimum.quanto import freeze, qint4, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from whole_models.workers.language import from_config, measure_language
from whole_models.workers.protocol import Job, serve


def prepare(job: Job) -> None:
    """options: dtype."""
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=getattr(torch, job.options["dtype"]))
    quantize(model, weights=qint4)
    freeze(model)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, job.folder / "model.safetensors"
    )
    (job.folder / "map.json").write_text(json.dumps(quantization_map(model)))
    model.config.save_pretrained(job.folder)


def load(job: Job) -> Any:
    model = from_config(job.folder)
    state = load_file(job.folder / "model.safetensors")
    requantize(model, state, json.loads((job.folder / "map.json").read_text()), device=torch.device("cpu"))
    return model


def measure(job: Job) -> dict[str, Any]:
    return measure_language(job, load)


if __name__ == "__main__":
    serve(prepare, measure)
