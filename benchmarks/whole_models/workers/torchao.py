"""SmolLM2 with torchao's weight-only quantization; every linear layer, the head (untied then) included.

What is saved is a pickled state dict: the prototype's packed int4 tensors have no other stored form.
"""

from __future__ import annotations

from typing import Any

import torch
from torchao import quantization
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from transformers import AutoModelForCausalLM

from whole_models.workers.language import from_config, measure_language
from whole_models.workers.protocol import Job, serve


def prepare(job: Job) -> None:
    """options: bits 4 (with group_size) or 8, and dtype."""
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=getattr(torch, job.options["dtype"]))
    if job.options["bits"] == 4:
        config = PrototypeInt4WeightOnlyConfig(group_size=job.options["group_size"])
    else:
        config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear))
    torch.save(model.state_dict(), job.folder / "model.pt")
    model.config.save_pretrained(job.folder)


def load(job: Job) -> Any:
    model = from_config(job.folder)
    model.load_state_dict(torch.load(job.folder / "model.pt", weights_only=False, mmap=True), assign=True)
    return model


def measure(job: Job) -> dict[str, Any]:
    return measure_language(job, load)


if __name__ == "__main__":
    serve(prepare, measure)
