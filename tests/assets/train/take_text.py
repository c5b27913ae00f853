"""Write ``debian-text``: some of what the small Mamba models read, and some that was held out from them.

Only pages of python3.11-doc (PSF-2.0) and postgresql-doc-15 (PostgreSQL) are taken, whose licences allow it; from the
start of each, in whole paragraphs. ``held_out.txt`` comes from the pages that train_lm.py does not train on,
``calibration.txt`` from evenly spread pages that it does. All packages of train_lm.py must be there, since which page
is held out depends on the others: installed, or unpacked into a folder (``dpkg-deb -x``).

    python take_text.py --root /usr/share/doc --output ../debian-text
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from train_lm import pages

PERMISSIVE = ("/python3.11/html/", "/postgresql-doc-15/html/")
PAGES = 1285  # of the packages' versions that the models were trained on
CHARACTERS = 4000  # of one page


def opening(page: str) -> str:
    """The first paragraphs, at most :data:`CHARACTERS` of them."""
    whole = page[: CHARACTERS + 1].rpartition("\n")[0] if len(page) > CHARACTERS else page
    return whole + "\n"


def spread(texts: Sequence[str], size: int) -> str:
    """Evenly spread texts of about so many bytes together."""
    mean = sum(len(text.encode()) for text in texts) / len(texts)
    count = min(len(texts), int(size / mean))
    return "".join(texts[i * len(texts) // count] for i in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("/usr/share/doc"))
    parser.add_argument("--output", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    found = pages(arguments.root)
    if len(found) != PAGES:
        raise SystemExit(f"{len(found)} pages and not {PAGES}: other packages, of which others were held out")
    parts: dict[str, list[str]] = {"held_out": [], "calibration": []}
    for index, (path, page) in enumerate(found.items()):
        if any(part in path for part in PERMISSIVE) and "genindex" not in path:  # an index has no sentences
            parts["calibration" if index % 20 else "held_out"].append(opening(page))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, size in (("held_out", 150_000), ("calibration", 245_000)):
        (arguments.output / f"{name}.txt").write_text(spread(parts[name], size))


if __name__ == "__main__":
    main()
