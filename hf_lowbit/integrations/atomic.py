"""Writing a model's folder so that a crash never leaves one that half-loads."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

# The file without which no library loads the folder: removed first, written last.
_ENTRY_FILES = ("config.json", "lowbit_config.json")
_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin)|.*\.safetensors\.index\.json")


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder beside ``folder``, then move its files in.

    A new folder appears in one rename. In an existing one the config is removed first and the new config comes last,
    so that at any moment the folder is the old model, no model, or the new one. Weight files of the old model that the
    new one does not have are removed; other files stay.

    Raises:
        NotADirectoryError: the target is a file.
    """
    target = Path(folder)
    if target.is_file():
        raise NotADirectoryError(f"{target} is a file; a folder is needed to save a model")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        staged = Path(scratch) / target.name
        staged.mkdir()
        write(staged)
        if not target.exists() or not any(target.iterdir()):
            shutil.copymode(target if target.exists() else target.parent, staged)
            os.replace(staged, target)
        else:
            _replace_contents(staged, target)


def _replace_contents(staged: Path, target: Path) -> None:
    for name in _ENTRY_FILES:
        (target / name).unlink(missing_ok=True)
    for path in target.iterdir():
        if path.is_file() and _WEIGHT_FILE.fullmatch(path.name) and not (staged / path.name).exists():
            path.unlink()
    for path in sorted(staged.iterdir(), key=lambda path: path.name in _ENTRY_FILES):
        destination = target / path.name
        if destination.is_dir() and not destination.is_symlink():
            shutil.rmtree(destination)
        os.replace(path, destination)
