"""``hf-lowbit quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, screen, size, work


@command("quickstart")
def quickstart_command(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the result; an earlier one is replaced.", show_default="quickstart-smollm2-<bits>bit"
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits per weight, as integers in groups of 64.", min=1, max=8)] = 4,
    max_tokens: Annotated[int, typer.Option(help="How many tokens of text it is measured on.", min=1024)] = 8192,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """See it work: fetch SmolLM2-135M, quantize it, reload it in a fresh process, measure it, ask it a question."""
    folder = output or Path(f"quickstart-smollm2-{bits}bit")
    with work():
        from hf_lowbit.cli.tour import tour

        values = tour(folder, bits, max_tokens)
    if json_output:
        print_json(values)
    else:
        _show(values)
    if not values["reload_equal"]:
        raise RuntimeError(f"the model loaded from {folder} is not the one that was saved there")


def _show(values: dict[str, Any]) -> None:
    from hf_lowbit.cli.quality import quality_rows

    seconds = values["seconds"]
    console = screen()
    console.print(f"\n[bold]{escape(values['model'])}[/bold] from {escape(values['source'])}", soft_wrap=True)
    if values["note"]:
        console.print(f"  [dim]{escape(values['note'])}[/dim]", soft_wrap=True)
    shrunk = f"{size(values['file_bytes'])} of weights on disk, {size(values['float_file_bytes'])} before"
    equal = "bit-equal to what was saved" if values["reload_equal"] else "NOT EQUAL to what was saved"
    before = f"{values['bits_per_weight']:.2f} bits per weight, {values['original_bits']} before"
    reused = ", kept from an earlier run with the same weights" if values["evaluation_reused"] else ""
    facts(
        [
            (
                "quantized",
                f"{values['layers']} layers with {values['elements'] / 1e6:.1f} million weights, "
                f"{seconds['quantize']:.1f} s",
            ),
            ("stored for them", f"{size(values['packed_bytes'])}, {before}"),
            ("size", shrunk),
            ("reload", f"in a fresh process, {equal} (sha256 {values['sha256'][:12]}), {seconds['load']:.1f} s"),
            *quality_rows({**values["evaluation"], "data": None}),
            (
                "",
                f"text shipped with hf_lowbit{reused}"
                if reused
                else f"text shipped with hf_lowbit, {seconds['evaluate']:.1f} s",
            ),
        ]
    )
    console.print(f"\n  {escape(values['question'])}", soft_wrap=True)
    console.print(f"  [green]{escape(values['answer'])}[/green]", soft_wrap=True)
    tokens = values["answer_tokens"]
    console.print(f"  [dim]{tokens} tokens in {seconds['answer']:.1f} s[/dim]\n", soft_wrap=True)
    facts(
        [("saved in", values["output"]), ("total time", f"{seconds['total']:.1f} s with {values['threads']} threads")]
    )
    console.print(f"\nNext: hf-lowbit inspect {escape(values['output'])} --layers", soft_wrap=True)
