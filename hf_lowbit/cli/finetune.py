"""``hf-lowbit finetune``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, screen, work
from hf_lowbit.cli.options import GROUP_SIZE, METHOD

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig

_DATA = typer.Option(
    metavar="FILE|DATASET",
    help='Texts (.txt), records with "text" or chat "messages" (.jsonl, .json), or a dataset (name[:config][@split]).',
    show_default=False,
)


@command("finetune")
def finetune_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder or a repository: a quantized language model, or a float one with --method.",
            show_default=False,
        ),
    ],
    data: Annotated[str, _DATA],
    output: Annotated[Path, typer.Option(help="Folder for the result: new or empty.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="Scales a new adapter: alpha / rank.", show_default="2 * rank")
    ] = None,
    targets: Annotated[str, typer.Option(help="Modules that get a new adapter, separated by commas.")] = "all-linear",
    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer; instead of --epochs.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The peak, after 3 % of the steps.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Samples of a forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Forward passes of a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute activations twice: less memory, about a third more time.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the adapter, the held-out samples and their order.")] = 0,
    method: Annotated[str | None, METHOD] = None,
    bits: Annotated[
        int | None, typer.Option(help="Quantize first: bits per weight.", show_default="the format's")
    ] = None,
    group_size: Annotated[str | None, GROUP_SIZE] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Quantize first: any other field. May be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Take up a run that was killed.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a LoRA adapter on a packed language model, and save it."""
    started = time.monotonic()
    with work():
        from hf_lowbit.cli.sources import check_model
        from hf_lowbit.finetuning import FinetuneSettings, finetune

        check_model(model)
        settings = FinetuneSettings(
            rank=rank,
            alpha=alpha,
            targets=targets if targets == "all-linear" else tuple(part.strip() for part in targets.split(",")),
            steps=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            accumulation=accumulation,
            max_length=max_length,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
        )
        config = _config(method, {"bits": bits, "group_size": group_size}, assignments or [], rank)
        try:
            result = finetune(model, data, output, settings, config, resume)
        except FileExistsError as error:
            raise FileExistsError(str(error).replace("pass resume=False", "add --restart")) from None
        seconds = time.monotonic() - started
    if json_output:
        print_json({**result, "output": str(output), "command_seconds": seconds})
    else:
        _show(model, output, result, seconds)


def _config(method: str | None, options: dict[str, Any], assignments: list[str], rank: int) -> LowbitConfig | None:
    """How to quantize first; None where nothing asks for it. The compensation becomes the adapter."""
    from hf_lowbit.cli.errors import RequestError
    from hf_lowbit.cli.settings import build_config

    if method is None:
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
        if given or assignments:
            raise RequestError(f"{', '.join([*given, *(['--set'] if assignments else [])])} needs --method NAME")
        return None
    return build_config(method, None, options, [f"low_rank.rank={rank}", "low_rank.keep=adapter", *assignments])


def _show(model: str, output: Path, result: dict[str, Any], seconds: float) -> None:
    screen().print(f"Fine-tuned {model}: {output}, {seconds:.1f} s in all", soft_wrap=True, markup=False)
    adapter, data, loss = result["adapter"], result["data"], result["held_out_loss"]
    facts(
        [
            ("data", f"{data['description']}; {data['train']} samples, {data['held_out']} held out"),
            (
                "adapter",
                f"rank {adapter['rank']}, {adapter['parameters']:,} parameters, from {adapter['initialisation']}",
            ),
            ("held-out loss", f"{loss['before']:.4f} before, {loss['after']:.4f} after"),
        ]
    )
