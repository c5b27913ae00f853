"""Finished measurements in a file: a search that is killed goes on, and another budget needs no new ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from hf_lowbit.calibration.checkpoint import ResumeError


class Measurements:
    """Name -> number, written as they are made.

    Attributes:
        taken: how many were there already.
    """

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        """Open a file or begin one; without a path nothing is kept.

        Raises:
            ResumeError: it holds something else, or measurements of another model, prompts or settings.
        """
        self._path, self._fingerprint = path, fingerprint
        self._values: dict[str, float] = {}
        if path is not None and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                known, values = stored["fingerprint"], dict(stored["measurements"])
            except (OSError, ValueError, TypeError, KeyError):
                raise ResumeError(f"{path} holds no measurements of a search; name another file") from None
            if known != fingerprint:
                raise ResumeError(
                    f"{path} holds measurements of another model, or with other prompts, steps or settings; delete it, "
                    "or name another file"
                )
            self._values = values
        self.taken = len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """The number of that name, measured if it is not known yet.

        Raises:
            ResumeError: the file cannot be written.
        """
        if name not in self._values:
            self._values[name] = measure()
            self._write()
        return self._values[name]

    def _write(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            content = {"fingerprint": self._fingerprint, "measurements": self._values}
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self._path)
        except OSError as error:
            raise ResumeError(f"{self._path} cannot be written: {error}") from None
