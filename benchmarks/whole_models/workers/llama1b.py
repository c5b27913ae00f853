"""A Llama of 1B parameters, shaped as Llama-3.2-1B with random weights: decode against the traffic of its weights."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowbit.kernels.cpu.products import read_bytes
from whole_models.workers.language import compiled_decode, decode
from whole_models.workers.native import native_library
from whole_models.workers.protocol import Job, memory, serve, size_mb, timed

READ_BYTES = 256 << 20
CONFIG = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def prepare(job: Job) -> None:
    """options: dtype; config of RTNConfig, absent for floats. The random bfloat16 weights are made once."""
    import hf_lowbit

    if not (job.source / "config.json").exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16)
        model.save_pretrained(job.source)
    if "config" not in job.options:
        shutil.copytree(job.source, job.folder, dirs_exist_ok=True, copy_function=_link)
        return
    config = hf_lowbit.RTNConfig(**job.options["config"])
    dtype = getattr(torch, job.options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype, quantization_config=config)
    model.save_pretrained(job.folder)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def bandwidth() -> float:
    """GB/s of a plain read of more than the caches hold, on all threads."""
    memory_read = torch.ones(READ_BYTES, dtype=torch.uint8)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        read_bytes(memory_read)
        times.append(time.perf_counter() - begun)
    return READ_BYTES / statistics.median(times) / 1e9


def measure(job: Job) -> dict[str, Any]:
    """Decode, and the speed that reading every stored weight once per token would allow.

    The tied embedding counts whole, since the head multiplies with all of it; the lookup reads one row, and the cache
    of keys and values (8 MB at 128 tokens) is left out.
    """
    import hf_lowbit  # noqa: F401

    torch.set_num_threads(job.threads)
    result: dict[str, Any] = {"new_tokens": job.new_tokens, "native_library": native_library()}
    with torch.no_grad():
        with timed(result, "load_s"):
            model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.options["dtype"]))
        result.update(memory("loaded"))
        before = bandwidth()
        if job.options.get("compiled"):
            result.update(compiled_decode(model, job))
        else:
            decode(model, job, 4)
            result["decode"] = decode(model, job, job.new_tokens)
        result["read_gb_s"] = statistics.mean((before, bandwidth()))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    result["weight_mb_per_token"] = size / 1e6
    result["bound"] = result["read_gb_s"] * 1e9 / size
    result["of_bound"] = result["decode"] / result["bound"]
    return {**result, **memory("decoded"), "disk_mb": size_mb(job.folder)}


if __name__ == "__main__":
    serve(prepare, measure)
