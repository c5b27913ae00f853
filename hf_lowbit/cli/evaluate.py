"""``hf-lowbit evaluate``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, say, screen, work

# Names of folders, and what is said of one run only.
_NOT_KEPT = ("model", "reference", "seconds")


@command("evaluate")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or repository of the model to measure.", show_default=False)
    ],
    reference: Annotated[
        str | None, typer.Option(help="The float model to compare with: KL and top-1 agreement, or its transcripts.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text; for speech a WAV file or a folder of them.", show_default="text shipped with hf_lowbit"
        ),
    ] = None,
    transcripts: Annotated[
        Path | None, typer.Option(help="Speech: a text file with one line for each recording, in order of their names.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Text: tokens per window.", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="Text: how many tokens of the data are used.", min=2)] = 16384,
    seed: Annotated[int, typer.Option(help="Of the bootstrap intervals.")] = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the numbers in the folder's report and model card.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a language model's perplexity and divergence from a reference, or a speech model's word error rate."""
    started = time.monotonic()
    with work():
        from hf_lowbit.cli.measure import measure_language, measure_speech
        from hf_lowbit.cli.sources import check_model, is_speech_model

        for name in (model, *(() if reference is None else (reference,))):
            check_model(name)
        if save:
            from hf_lowbit.cli.account import accounts

            accounts(Path(model))  # refuses what is no saved result before the work begins
        if is_speech_model(model):
            measured, values = measure_speech(model, reference, data, transcripts, seed)
        else:
            measured, values = measure_language(model, reference, data, sequence_length, max_tokens, seed)
        values = {"model": model, "reference": reference, **values, "seed": seed, "seconds": time.monotonic() - started}
        if save:
            from hf_lowbit.cli.keep import keep_evaluation

            kept = {name: value for name, value in values.items() if name not in _NOT_KEPT}
            kept["command"] = _command(model, reference, data, transcripts, values)
            keep_evaluation(measured, Path(model), kept)
            say(f"the numbers are kept in {model}")
    if json_output:
        print_json(values)
    else:
        _show(values)


def _command(
    model: str, reference: str | None, data: Path | None, transcripts: Path | None, values: dict[str, Any]
) -> str:
    """The command that measures the same, for the model card; of local paths only the last part."""
    named = {"--reference": reference, "--data": data, "--transcripts": transcripts}
    parts = ["hf-lowbit", "evaluate", Path(model).name]
    for option, value in named.items():
        if value is not None:
            parts += [option, Path(value).name if Path(value).exists() else str(value)]
    for option in ("sequence_length", "max_tokens"):
        if option in values:
            parts += [f"--{option.replace('_', '-')}", str(values[option])]
    return shlex.join([*parts, "--seed", str(values["seed"])])


def _show(values: dict[str, Any]) -> None:
    from hf_lowbit.cli.quality import quality_rows

    compared = f" compared with {values['reference']}" if values["reference"] else ""
    screen().print(f"{values['model']}{compared}", soft_wrap=True, markup=False)
    facts([*quality_rows(values), ("time", f"{values['seconds']:.1f} s")])
    for recording, text in zip(values.get("recordings", []), values.get("hypotheses", []), strict=True):
        screen().print(f"\n{recording}: {text}", soft_wrap=True, markup=False)
