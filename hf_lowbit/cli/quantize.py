"""``hf-lowbit quantize``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import print_json, say, screen, work
from hf_lowbit.cli.options import CONFIG_FILE, DATA, GROUP_SIZE, METHOD


@command("quantize")
def quantize_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder or a repository: a model, or a diffusion pipeline.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the result: new, empty, or an earlier result.", show_default=False)
    ],
    method: Annotated[str | None, METHOD] = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight.", show_default="the format's")] = None,
    group_size: Annotated[str | None, GROUP_SIZE] = None,
    number_format: Annotated[
        str | None, typer.Option("--format", help="Number format: int, nf, fp_e2m1, ternary, ...", show_default="int")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of the method: --set activation_bits=8 --set low_rank.rank=16 "
            "--set overrides.lm_head.bits=8. hf-lowbit methods NAME lists them. May be repeated.",
        ),
    ] = None,
    data: Annotated[str | None, DATA] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="Of a pipeline, instead of data: what is drawn to calibrate on. A prompt, or a .txt file with one in "
            "each line; a class label where the pipeline draws classes. May be repeated.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps of these pictures.", min=1, show_default="the pipeline's")
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(help="How many of the steps are recorded, evenly spaced.", min=1, show_default="all, at most 25"),
    ] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another argument of the pipeline's call: --call guidance_scale=5 --call height=512. May be repeated.",
        ),
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Part of a pipeline to quantize; by default its denoiser. May be repeated."),
    ] = None,
    config_file: Annotated[Path | None, CONFIG_FILE] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="That calibrates, block by block: cuda, cuda:1, cpu. The model itself stays in the host's memory.",
            show_default="cpu",
        ),
    ] = None,
    from_disk: Annotated[
        bool,
        typer.Option(
            "--from-disk",
            help="Read each block of a calibrated model when it is reached: of a local folder that the memory does not "
            "hold.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace an earlier result instead of keeping or refusing it.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize a model while it loads, and save it."""
    started = time.monotonic()
    with work() as warnings:
        from hf_lowbit.cli.account import accounts
        from hf_lowbit.cli.prompts import read_prompts
        from hf_lowbit.cli.run import quantize_to
        from hf_lowbit.cli.settings import build_config, parse_call
        from hf_lowbit.cli.sources import check_data, check_model

        options = {"bits": bits, "group_size": group_size, "format": number_format}
        config = build_config(method, config_file, options, assignments or [])
        check_model(model)
        check_data(data)
        drawing = {
            "prompts": read_prompts(prompts) if prompts else None, "steps": steps, "timesteps": timesteps,
            **parse_call(call or []),
        }  # fmt: skip
        placing = {"device": device, "weights": "disk" if from_disk else None}
        kept = quantize_to(model, config, output, data, component, restart, {**drawing, **placing})
        result = accounts(output)
        seconds = time.monotonic() - started
    from hf_lowbit.cli.view import account_json, show_account

    if json_output:
        print_json({**account_json(output, result), "model": model, "kept": kept, "command_seconds": seconds})
        return
    if kept:
        say(f"{output} already holds this result; nothing was done (--restart makes it anew)")
    screen().print(
        f"{'Kept' if kept else 'Quantized'} {model} in {output}, {seconds:.1f} s in all", soft_wrap=True, markup=False
    )
    show_account(result, warnings)
