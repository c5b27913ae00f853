"""What a killed run leaves behind: the finished blocks, under a fingerprint of all that decides their bits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "lowbit_resume.json"


class ResumeError(OSError):
    """A resume folder that belongs to another run, or cannot be written."""


class Checkpoint:
    """A folder with one file per finished block.

    Attributes:
        folder: of this run; deleted by :meth:`finish`.
    """

    def __init__(self, folder: Path, fingerprint: str, resume: bool = True, lock: FileLock | None = None) -> None:
        """Open a folder, or begin one.

        ``lock`` is that of :func:`unshared`, released by :meth:`finish` or :meth:`leave`.

        Raises:
            ResumeError: it holds files of something else, another run's blocks while ``resume`` is on, or cannot be
                written.
        """
        self.folder, self._lock = folder, lock
        manifest = folder / MANIFEST
        if folder.exists():
            if not folder.is_dir() or (any(folder.iterdir()) and not manifest.is_file()):
                raise ResumeError(f"{folder} holds files hf_lowbit did not write; move them, or name another output")
            if manifest.is_file() and (not resume or _read(manifest).get("fingerprint") != fingerprint):
                if resume:
                    raise ResumeError(
                        f"{folder} holds an unfinished run of another model, config, data or machine setting; finish "
                        "that one, pass resume=False to discard it, or name another output"
                    )
                shutil.rmtree(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not manifest.is_file():
                _write(manifest, json.dumps({"fingerprint": fingerprint}).encode())
        except OSError as error:
            raise ResumeError(f"{folder} cannot be written, so that the run could not be resumed: {error}") from None

    @property
    def finished(self) -> int:
        """Blocks of an earlier run that can be taken over."""
        return len(list(self.folder.glob("*.safetensors")))

    def save(self, block: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write one finished block, whole or not at all."""
        path = self._path(block)
        partial = path.with_suffix(".partial")
        metadata = {"block": block, "facts": json.dumps(facts)}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        os.replace(partial, path)

    def load(self, block: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of a finished block; None if it is not there, or not whole."""
        path = self._path(block)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["facts"])
        except (SafetensorError, ValueError, KeyError):
            path.unlink()  # a machine that lost power may leave half a file under the final name
            return None

    def finish(self) -> None:
        """Delete the folder: the result is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self.leave()

    def leave(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()

    def _path(self, block: str) -> Path:
        return self.folder / f"{hashlib.sha256(block.encode()).hexdigest()[:20]}.safetensors"


def unshared(folder: Path) -> tuple[Path, FileLock | None]:
    """The folder with a lock on it; while another process works on the same run, one of this process' own instead."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        return folder.with_name(f"{folder.name}-{os.getpid()}"), None
    except OSError:  # Checkpoint says why the folder cannot be written
        return folder, None
    return folder, lock


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]], facts: Mapping[str, Any]) -> str:
    """sha256 of a model's tensors, and of facts such as config, data, threads and versions.

    Of a tensor on the meta device its name, type and shape: where its values come from is one of the facts.
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            continue
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
