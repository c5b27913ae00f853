"""The command line, and the JSON file that a run is resumed from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from finetuning import curves, memory


def main(description: str | None) -> None:
    """Measure what is not in the output file yet, and show all of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a float language model")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--format", default="int")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16, help="held-out windows")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(curves.VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("finetune_work"), help="folder for the quantized models")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    part = memory if options.memory else curves
    output = options.output or Path(part.OUTPUT)
    part.measure(options, Store(output))
    part.show(json.loads(output.read_text())["rows"], options)


class Store:
    """Rows of a JSON file, one for each key; every addition is written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a row with these settings is there."""
        return any(row["key"] == key for row in self.rows)

    def add(self, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Write a row."""
        self.rows.append({"key": key, **values})
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        new.replace(self.path)
