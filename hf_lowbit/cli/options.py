"""Options that several commands have."""

from __future__ import annotations

import typer

METHOD = typer.Option(help="The method's name; hf-lowbit methods lists them.", show_default=False)
GROUP_SIZE = typer.Option(help="Weights that share a scale: a number, row or tensor.", show_default="the method's")
CONFIG_FILE = typer.Option("--config", help="A JSON file with fields; options override it.")
DATA = typer.Option(
    metavar="FILE|DATASET|self",
    help="Calibration data: texts (.txt, .jsonl, .json), a dataset (name[:config][@split]), or self: text that the "
    "model writes.",
    show_default=False,
)
