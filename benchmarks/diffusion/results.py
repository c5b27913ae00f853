"""The rows that are known, and the file that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion.rows import Row, all_rows
from diffusion.settings import Settings


class Results:
    """The rows of these settings, and the file that they are written to; rows of other settings in it are kept."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self._path, self._settings = path, settings
        stored = json.loads(path.read_text())["runs"] if path is not None and path.exists() else []
        same = [run for run in stored if run["settings"] == settings.identity]
        self._others = [run for run in stored if run["settings"] != settings.identity]
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for run in same for row in run["rows"]}
        self.noise: dict[str, list[float]] = same[0]["noise"] if same else {}

    def has(self, name: str) -> bool:
        """Whether a row was measured, and did not fail."""
        return name in self.rows and "failed" not in self.rows[name]

    def add(self, row: Row, facts: dict[str, Any]) -> None:
        """One row, written at once."""
        self.rows[row.name] = {"name": row.name, "method": row.method, "fields": row.fields, **facts}
        self.write()

    def write(self) -> None:
        """All of it, in the place of the file."""
        if self._path is None:
            return
        order = list(all_rows())
        rows = sorted(self.rows.values(), key=lambda row: order.index(row["name"]) if row["name"] in order else 999)
        run = {"settings": self._settings.identity, "noise": self.noise, "rows": rows}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"runs": [*self._others, run]}, indent=1) + "\n")
        new.replace(self._path)
