"""TensorStore: activations of a whole calibration set, in memory up to a limit and on disk beyond it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger("hf_lowbit")


class TensorStore:
    """Tensors by number. What does not fit the memory limit is written to a temporary folder, and read when needed.

    Attributes:
        limit: bytes kept in memory; None for no limit.
        device: that tensors are handed out on; they are kept in the host's memory, page-locked, which its copies need
            to be fast. None: they are kept and handed out where they come from.
        held: bytes in memory now.
        spilled: bytes written to disk so far.
    """

    def __init__(
        self, limit: int | None = None, folder: Path | None = None, device: torch.device | None = None
    ) -> None:
        self.limit, self.device, self.held, self.spilled = limit, device, 0, 0
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tensors: dict[int, Tensor | _Spilled] = {}
        self._next = 0

    def put(self, tensor: Tensor) -> int:
        """Keep a tensor, detached; the number to :meth:`get` it by."""
        key, self._next = self._next, self._next + 1
        self._keep(key, tensor.detach())
        return key

    def replace(self, key: int, tensor: Tensor) -> None:
        """Put another tensor in the place of one."""
        kept = self._tensors[key]
        if self.device is not None and isinstance(kept, Tensor) and _alike(kept, tensor):
            kept.copy_(tensor.detach())  # locking pages takes longer than copying them
            return
        self.drop(key)
        self._keep(key, tensor.detach())

    def get(self, key: int) -> Tensor:
        """The tensor, on the store's device or the one it came from."""
        kept = self._tensors[key]
        if isinstance(kept, Tensor):
            return kept if self.device is None else kept.to(self.device)
        return load_file(kept.path)["t"].to(kept.device)

    def drop(self, key: int) -> None:
        """Forget a tensor."""
        kept = self._tensors.pop(key)
        if isinstance(kept, _Spilled):
            kept.path.unlink()
        else:
            self.held -= _size(kept)

    def close(self) -> None:
        """Forget everything, on disk too."""
        self._tensors, self.held = {}, 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _keep(self, key: int, tensor: Tensor) -> None:
        size = _size(tensor)
        if self.limit is None or self.held + size <= self.limit:
            self._tensors[key] = tensor if self.device is None else _on_host(tensor)
            self.held += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="lowbit-activations-", dir=self._parent)
            logger.info("activations exceed %d MB: the rest is kept in %s", self.limit >> 20, self._folder.name)
        path = Path(self._folder.name) / f"{key}.safetensors"
        save_file({"t": tensor.contiguous().cpu()}, path)
        self.spilled += size
        self._tensors[key] = _Spilled(path, self.device or tensor.device)


class _Spilled(NamedTuple):
    """A tensor on disk, and where it is handed out."""

    path: Path
    device: torch.device


def _on_host(tensor: Tensor) -> Tensor:
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return kept.copy_(tensor)


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def default_limit() -> int:
    """Half of the memory that is free now, or 2 GB where the system does not tell."""
    try:
        import os

        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 2 << 30


def to_compute(value: Any, dtype: torch.dtype) -> Any:
    """A tensor in the type that blocks compute in, if it is floating; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
