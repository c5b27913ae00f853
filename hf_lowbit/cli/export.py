"""``hf-lowbit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, screen, size, work


@command("export")
def export_command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or repository of a quantized model.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder for the exported model: new or empty.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="Format to write.")] = "compressed-tensors",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a quantized model for plain transformers, which loads the same weights without hf_lowbit, and for vLLM."""
    with work():
        from hf_lowbit.cli.sources import check_model
        from hf_lowbit.export import export_model

        check_model(folder)
        result = export_model(folder, output, to)
    if json_output:
        values = {"model": folder, "output": str(output), "format": result.format, "storage": result.storage}
        counts = {"layers": result.layers, "groups": result.groups, "bytes": result.bytes}
        print_json({**values, **counts, "vllm": list(result.vllm)})
        return
    screen().print(f"Exported {folder} to {output}", soft_wrap=True, markup=False)
    rows = [("format", f"{result.format}, {result.storage}"), ("layers", str(result.layers))]
    facts([*rows, ("config groups", str(result.groups)), ("size", size(result.bytes))])
