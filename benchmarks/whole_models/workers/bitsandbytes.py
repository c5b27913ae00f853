"""SmolLM2 in NF4 by bitsandbytes, through transformers. The embedding, tied to the head, stays float."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from whole_models.workers.language import measure_language
from whole_models.workers.protocol import Job, serve


def prepare(job: Job) -> None:
    """options: dtype, of the rest and of the products."""
    dtype = getattr(torch, job.options["dtype"])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype, quantization_config=config, device_map="cpu")
    model.save_pretrained(job.folder)


def load(job: Job) -> Any:
    dtype = getattr(torch, job.options["dtype"])
    return AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype, device_map="cpu")


def measure(job: Job) -> dict[str, Any]:
    return measure_language(job, load)


if __name__ == "__main__":
    serve(prepare, measure)
