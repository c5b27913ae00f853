"""One picture of rows that several runs of the quality benchmarks have measured: KL against bits per weight.

    python benchmarks/quality_picture.py ROWS.json... --variants rtn,gptq,... --output quality.png
                                         [--bits 4,3,2] [--group 64]

Where two files have the same row, the first one's is drawn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quality.picture import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--variants", required=True)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--group", default="64", help="weights per scale, or row")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    variants, bits = options.variants.split(","), [int(each) for each in options.bits.split(",")]
    group = None if options.group == "row" else int(options.group)
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    models = []
    for path in options.rows:
        found = json.loads(path.read_text())
        models.append(found["model"])
        for row in found["rows"]:
            if row["variant"] in variants and row["bits"] in bits and row["group"] == group:
                chosen.setdefault((row["variant"], row["bits"]), row)
    if len(set(models)) > 1:
        parser.error(f"rows of several models: {', '.join(models)}")
    if missing := [name for name in variants if not any(variant == name for variant, _ in chosen)]:
        parser.error(f"--variants: no rows of {', '.join(missing)}")
    draw(list(chosen.values()), options.output, models[0])


if __name__ == "__main__":
    main()
