"""``hf-lowbit compare``: what diffusion pipelines draw, side by side and in numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import print_json, say, screen, size, work


@command("compare")
def compare_command(
    pipelines: Annotated[
        list[str],
        typer.Argument(
            metavar="FLOAT OTHER...",
            help="Folders or repositories of diffusion pipelines; the first is what the others are held against.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT|FILE",
            help="A prompt, or a .txt file with one in each line; a class label where the pipelines draw classes. "
            "May be repeated.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the result: new or empty.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    seed: Annotated[int, typer.Option(help="Of the first picture; the others count up from it.")] = 0,
    per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt; the grid shows the first.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once.", min=1)] = 16,
    call: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other argument of the pipelines' call: --call guidance_scale=5. May be repeated.",
        ),
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a picture classifier of hf_lowbit: adds distances in its features, and agreement with the "
            "prompts.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the pipelines run.")] = "cpu",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw the same prompts with several pipelines: grid.png, pareto.png and compare.json."""
    started = time.monotonic()
    with work():
        from hf_lowbit.cli.prompts import read_prompts
        from hf_lowbit.cli.settings import parse_call
        from hf_lowbit.cli.sources import check_model, check_new_folder

        for name in pipelines:
            check_model(name)
        check_new_folder(output)
        asked, arguments = read_prompts(prompts), parse_call(call or [])
        from hf_lowbit.evaluation.figure import new_figure
        from hf_lowbit.evaluation.pictures import compare

        new_figure(1, 1)  # refuses before the work where there is no matplotlib
        found = compare(
            pipelines, asked, steps=steps, seed=seed, per_prompt=per_prompt, batch_size=batch_size,
            classifier=classifier, device=device, say=say, **arguments,
        )  # fmt: skip
        found.save(output)
        seconds = time.monotonic() - started
    if json_output:
        print_json({**found.to_dict(), "output": str(output), "command_seconds": seconds})
        return
    screen().print(_table(found.rows))
    screen().print(f"Pictures and numbers are in {output}, {seconds:.1f} s in all", soft_wrap=True, markup=False)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    columns = {
        "ssim": ("SSIM", "{:.4f}"), "psnr": ("PSNR, dB", "{:.2f}"), "map_distance": ("map distance", "{:.4f}"),
        "fid": ("Fréchet", "{:.4g}"), "kid": ("kernel", "{:.3g}"), "agreement": ("agreement", "{:.1%}"),
    }  # fmt: skip
    measured = [name for name in columns if any(name in row for row in rows)]
    table.add_column("pipeline", overflow="fold")
    for heading in ("bits per weight", "denoiser", "s per picture", *(columns[name][0] for name in measured)):
        table.add_column(heading, justify="right")
    for row in rows:
        known = [columns[name][1].format(row[name]) if name in row else "" for name in measured]
        facts = (f"{row['bits_per_weight']:.3f}", size(row["denoiser_bytes"]), f"{row['seconds_per_picture']:.3f}")
        table.add_row(row["label"], *facts, *known)
    return table
