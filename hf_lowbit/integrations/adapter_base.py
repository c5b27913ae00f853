"""Which packed base a compensation adapter is of: it repairs what rounding left of that one, and harms any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.nn import CorruptWeightError, PackedModule

_FILE = "lowbit_base.json"
_SAMPLES = 4096  # entries of each stored tensor that count, evenly spread: all of them would take seconds per gigabyte


def record_base(folder: Path, modules: Mapping[str, Any]) -> None:
    """Write the fingerprints of the packed modules that the adapter in ``folder`` is of; offloaded ones have none."""
    found = {name: _fingerprint(module) for name, module in modules.items() if isinstance(module, PackedModule)}
    known = {name: digest for name, digest in found.items() if digest is not None}
    (folder / _FILE).write_text(json.dumps({"fingerprints": known}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_base(folder: Path, modules: Mapping[str, PackedModule]) -> None:
    """Refuse an adapter that was made for other codes than these.

    Args:
        modules: name at the time of saving -> module. Those that the folder does not name, or that are offloaded, pass.

    Raises:
        CorruptWeightError: naming the first such module.
    """
    try:
        stored = json.loads((folder / _FILE).read_text(encoding="utf-8"))["fingerprints"]
    except FileNotFoundError:  # made by an earlier version
        return
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptWeightError(f"{folder / _FILE} cannot be read: {error!r}") from None
    for name, module in modules.items():
        expected, found = stored.get(name), _fingerprint(module)
        if expected is not None and found is not None and expected != found:
            raise CorruptWeightError(
                f"the compensation adapter in {folder} was made for another base: {name} has other codes than those it "
                "repairs. Load it with the packed weights that it was saved with, or delete its folder"
            )


def _fingerprint(module: PackedModule) -> str | None:
    """Of a module's stored tensors: names, shapes and a sample of entries; None if they are not in memory."""
    digest = hashlib.sha256()
    for parameter in module.packed_parameters:
        for key in sorted(module.companion_shapes(parameter)):
            tensor: Tensor = getattr(module, key)
            if tensor.is_meta:
                return None
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // _SAMPLES)
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
