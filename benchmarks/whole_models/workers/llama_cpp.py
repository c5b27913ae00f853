"""SmolLM2 in llama.cpp: its own GGUF, requantized, and its own greedy loop."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp

from whole_models.workers.protocol import Clock, Job, memory, serve, size_mb, timed, tokens

FILE = "model.gguf"


def prepare(job: Job) -> None:
    """``source`` is a GGUF; options: type, one of llama.cpp's LLAMA_FTYPE_MOSTLY_; pure: head and embedding too."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.options['type']}")
    parameters.pure = job.options.get("pure", False)
    parameters.allow_requantize = True
    status = llama_cpp.llama_model_quantize(
        str(job.source).encode(), str(job.folder / FILE).encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def decode(model: Any, job: Job, new_tokens: int) -> float:
    """Tokens per second after the first new one; the end of text does not stop it."""
    clock = Clock()
    model.reset()
    for _ in model.generate(tokens(job.prompt_tokens), temp=0.0):
        clock.tick()
        if len(clock.moments) == new_tokens:
            break
    return clock.rate()


def prefill(model: Any, job: Job) -> float:
    """Tokens per second of evaluating the long prompt, the second time."""
    for _ in range(2):
        model.reset()
        begun = time.perf_counter()
        model.eval(tokens(job.prefill_tokens))
        seconds = time.perf_counter() - begun
    return job.prefill_tokens / seconds


def measure(job: Job) -> dict[str, Any]:
    """As :func:`whole_models.workers.language.measure_language`."""
    result: dict[str, Any] = {"new_tokens": job.new_tokens, **memory("imported")}
    threads = {"n_threads": job.threads, "n_threads_batch": job.threads}
    with timed(result, "load_s"):
        model = llama_cpp.Llama(str(job.folder / FILE), n_ctx=1024, n_batch=512, verbose=False, **threads)
    result.update(memory("loaded"))
    decode(model, job, 4)
    result["decode"] = decode(model, job, job.new_tokens)
    result.update(memory("decoded"))
    result["prefill"] = prefill(model, job)
    return {**result, **memory("prefilled"), "disk_mb": size_mb(job.folder)}


if __name__ == "__main__":
    serve(prepare, measure)
