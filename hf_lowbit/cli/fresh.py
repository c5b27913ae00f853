"""A process of its own that loads a saved model as a user would: ``python -m hf_lowbit.cli.fresh FOLDER QUESTION``.

It prints one JSON object: the fingerprint of what it loaded, and the model's answer.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MAX_NEW_TOKENS = 24


def fingerprint(model: nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every tensor of a model's state dict."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_in_fresh_process(folder: Path, question: str) -> dict[str, Any]:
    """Run this module in a new process.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    command = [sys.executable, "-m", "hf_lowbit.cli.fresh", str(folder), question]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{folder} could not be loaded in a fresh process: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def load_and_answer(folder: str, question: str) -> dict[str, Any]:
    """Load with transformers alone, fingerprint, and answer greedily through the chat template."""
    started = time.monotonic()
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_lowbit  # noqa: F401  (what makes transformers know the format)

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    loaded = time.monotonic()
    found = fingerprint(model)
    nn.Module.to(model, torch.float32)  # packed weights stay as they are; many CPUs are slow in bfloat16
    answering = time.monotonic()
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "stop_strings": ["."], "tokenizer": tokenizer}  # its first sentence
    output = model.generate(**inputs, **limits, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    cut = len(answer) == MAX_NEW_TOKENS
    return {
        "sha256": found,
        "answer": tokenizer.decode(answer, skip_special_tokens=True).strip() + (" ..." if cut else ""),
        "answer_tokens": len(answer),
        "load_seconds": loaded - started,
        "answer_seconds": time.monotonic() - answering,
    }


if __name__ == "__main__":
    print(json.dumps(load_and_answer(sys.argv[1], sys.argv[2])))
