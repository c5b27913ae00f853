"""Run in a process of its own, which cannot import hf_lowbit: load exported folders with plain transformers.

Arguments: a file with {name: {"folder", "auto", "inputs"}}, and the file to write {name: {"logits", "weights"}} to.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class Blocked(importlib.abc.MetaPathFinder):
    """As if hf_lowbit and its plugins were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse our names, know nothing of others."""
        if name.startswith("hf_lowbit"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def read(folder: str, auto: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Logits and state dict after the first forward, when every layer has been decoded."""
    import torch
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    dtype = model.dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    return {"logits": logits, "weights": model.state_dict(), "problems": problems}


def main() -> None:
    """Read all folders."""
    sys.meta_path.insert(0, Blocked())
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, request in torch.load(sys.argv[1], weights_only=True).items():
        try:
            results[name] = read(**request)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    assert not [name for name in sys.modules if name.startswith("hf_lowbit")]
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
