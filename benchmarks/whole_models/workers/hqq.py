"""SmolLM2 in 4 bits by HQQ: linear layers without the tied head, products in torch; the model is pickled."""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from transformers import AutoModelForCausalLM

from whole_models.workers.language import measure_language
from whole_models.workers.protocol import Job, serve


def prepare(job: Job) -> None:
    """options: dtype, group_size."""
    dtype = getattr(torch, job.options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype)
    config = BaseQuantizeConfig(nbits=4, group_size=job.options["group_size"])
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = HQQLinear(module, config, compute_dtype=dtype, device="cpu")
            model.set_submodule(name, packed)
    torch.save(model, job.folder / "model.pt")


def load(job: Job) -> Any:
    HQQLinear.set_backend(HQQBackend.PYTORCH)  # gives the class its forward, which pickles do not hold
    return torch.load(job.folder / "model.pt", weights_only=False, mmap=True)


def measure(job: Job) -> dict[str, Any]:
    return measure_language(job, load)


if __name__ == "__main__":
    serve(prepare, measure)
