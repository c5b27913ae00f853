"""Folders that are built once: complete or absent, whatever kills the process that builds them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

SOURCE_FILE = "source.json"


def cache_home() -> Path:
    """The folder of all fetched models and data: ``$HF_LOWBIT_HOME/testbed``, else ``~/.cache/hf_lowbit/testbed``."""
    home = os.environ.get("HF_LOWBIT_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "hf_lowbit") / "testbed"


def cached_folder(name: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder ``name`` under the testbed's home, built if it is not there.

    ``build`` fills an empty folder and returns what is recorded in its ``source.json`` (origin, licence). The folder
    then takes its place in one rename. A second process waits for the first, and finds its result.

    Raises:
        Whatever ``build`` raises; nothing is left behind then.
    """
    folder = cache_home() / name
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if is_complete(folder):
            return folder
        _remove_leftovers(folder)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as scratch:
            staged = Path(scratch) / name
            staged.mkdir()
            source = build(staged)
            (staged / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
            if folder.exists():  # of another origin: without a source.json it was not built here
                os.replace(folder, Path(scratch) / "replaced")
            os.replace(staged, folder)
        announce(f"{name}: ready in {folder} ({size_of(folder) / 1e6:.0f} MB, {time.monotonic() - start:.0f} s)")
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the folder was built to its end."""
    return (folder / SOURCE_FILE).is_file()


def read_source(folder: str | Path) -> dict[str, Any]:
    """What is recorded about a fetched folder: ``name``, ``source``, ``license``, ``note`` and more.

    Raises:
        FileNotFoundError: the folder was not fetched by the testbed.
    """
    source: dict[str, Any] = json.loads((Path(folder) / SOURCE_FILE).read_text(encoding="utf-8"))
    return source


def size_of(folder: Path) -> int:
    """Bytes of all files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def announce(message: str) -> None:
    """Tell the user, on stderr, about work that takes a while or much space."""
    print(f"[hf_lowbit] {message}", file=sys.stderr, flush=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left; only while the lock is held, so that nobody is writing there."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
