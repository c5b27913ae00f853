"""The rows that are known, and the file that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mambas.rows import Row, all_rows
from mambas.settings import Settings, generation_of


class File:
    """{"quality": [{"settings", "rows"}], "speed": [{"model", "conditions", "rows"}]}; nothing is lost by writing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        stored = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.quality: list[dict[str, Any]] = stored.get("quality", [])
        self.speed: list[dict[str, Any]] = stored.get("speed", [])

    def rows(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """Quality with these settings, by name."""
        run = next((run for run in self.quality if run["settings"] == settings.identity), None)
        return {row["name"]: row for row in run["rows"]} if run else {}

    def has(self, settings: Settings, row: Row) -> bool:
        """Whether a row was measured with these fields. A failure counts only of a peer that was there."""
        known = self.rows(settings).get(row.name)
        if known is None or known["fields"] != row.fields:
            return False
        return "failed" not in known or (row.is_peer and not known["failed"].startswith("ImportError"))

    def add(self, settings: Settings, row: Row, facts: dict[str, Any]) -> dict[str, Any]:
        """One row, written at once, in the order of the rows."""
        entry = {"name": row.name, "method": row.method, "fields": row.fields, **facts}
        rows = {**self.rows(settings), row.name: entry}
        order = {name: index for index, name in enumerate(all_rows(generation_of(settings.model)))}
        run = {"settings": settings.identity, "rows": sorted(rows.values(), key=lambda r: order.get(r["name"], 999))}
        places = [index for index, other in enumerate(self.quality) if other["settings"] == settings.identity]
        if places:
            self.quality[places[0]] = run
        else:
            self.quality.append(run)
        self._write()
        return entry

    def add_speed(self, model: str, conditions: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """One model's, in the place of an earlier run's: rows of two runs are never compared."""
        self.speed = [run for run in self.speed if run["model"] != model]
        self.speed.append({"model": model, "conditions": conditions, "rows": rows})
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"quality": self.quality, "speed": self.speed}, indent=1) + "\n")
        new.replace(self._path)
