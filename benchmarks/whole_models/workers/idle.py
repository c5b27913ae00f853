"""A process that imports and does nothing: what the memory of the others is compared with."""

from __future__ import annotations

import importlib
from typing import Any

from whole_models.workers.protocol import Job, memory, serve, timed


def measure(job: Job) -> dict[str, Any]:
    """``options["modules"]``: imported in this order; transformers' classes are looked up, since they load late."""
    result: dict[str, Any] = {}
    with timed(result, "import_s"):
        for name in job.options["modules"]:
            module = importlib.import_module(name)
            if name == "transformers":
                _ = module.AutoModelForCausalLM, module.LlamaForCausalLM
    return {**result, **memory("imported")}


if __name__ == "__main__":
    serve(lambda job: None, measure)
