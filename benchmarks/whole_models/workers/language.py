"""What is measured of a causal language model of transformers: loading, memory, decode and prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from whole_models.workers.protocol import Clock, Job, memory, size_mb, timed, tokens

SLOW_PREFILL_SECONDS = 5.0


class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when each new token comes. `generate` gives the prompt first, at its start."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            self.clock.tick()
        self.prompt_seen = True

    def end(self) -> None:
        pass


def decode(model: Any, job: Job, new_tokens: int, **arguments: Any) -> float:
    """Greedy `generate` after a prompt; tokens per second after the first new one."""
    prompt = torch.tensor([tokens(job.prompt_tokens)])
    streamer = TokenClock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
        **arguments,
    )
    return streamer.clock.rate()


def prefill(model: Any, job: Job) -> float:
    """Tokens per second of one forward pass; the second one, unless the first is slow."""
    prompt = torch.tensor([tokens(job.prefill_tokens)])
    for _ in range(2):
        begun = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - begun
        if seconds > SLOW_PREFILL_SECONDS:
            break
    return job.prefill_tokens / seconds


def from_config(folder: Path) -> Any:
    """A model whose weights are still to come. Its buffers, which no state dict holds, are real."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config))
    return model


def measure_language(job: Job, load: Callable[[Job], Any]) -> dict[str, Any]:
    """Everything about the model that ``load`` returns. Times in s, memory and sizes in MB, speeds in tokens/s."""
    torch.set_num_threads(job.threads)
    result: dict[str, Any] = {"new_tokens": job.new_tokens, **memory("imported")}
    with torch.no_grad():
        with timed(result, "load_s"):
            model = load(job)
            model.eval()
        model.generation_config.eos_token_id = None  # the end of text stops nothing, nor is it looked for
        result.update(memory("loaded"))
        if job.options.get("compiled"):
            result.update(compiled_decode(model, job))
        else:
            decode(model, job, 4)
            result["decode"] = decode(model, job, job.new_tokens)
        result.update(memory("decoded"))  # by now every page of a memory-mapped file was touched
        if not job.options.get("compiled"):
            result["prefill"] = prefill(model, job)
    return {**result, **memory("prefilled"), "disk_mb": size_mb(job.folder)}


def compiled_decode(model: Any, job: Job) -> dict[str, float]:
    """Decode with a static cache and a compiled step: transformers compiles on accelerators only, unless told so.

    The prefill stays eager, as transformers has it. ``compile_s`` is what the first call took longer than the second.
    """
    from hf_lowbit import compile_config

    config = compile_config(modules_stay=model if job.options.get("modules_stay") else False)
    arguments = {"cache_implementation": "static", "compile_config": config}
    times: dict[str, float] = {}
    with timed(times, "first"):
        decode(model, job, job.new_tokens, **arguments)
    with timed(times, "second"):
        rate = decode(model, job, job.new_tokens, **arguments)
    return {"decode": rate, "compile_s": times["first"] - times["second"]}
