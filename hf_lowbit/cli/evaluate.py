"""``hf-lowbit evaluate``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, say, screen, work
from hf_lowbit.cli.stages import CALIBRATION, STAGES, measure_stages, show_stages
from hf_lowbit.cli.tasks import BATCH_SIZE, LIMIT, SHOTS, TASK_FOLDER, TASKS, TaskRequest, task_rows

# Names of folders, and what is said of one run only.
_NOT_KEPT = ("model", "reference", "seconds", "method", "bits_per_weight")


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
    stages: Annotated[bool, STAGES] = False,
    calibration: Annotated[str | None, CALIBRATION] = None,
    tasks: Annotated[str | None, TASKS] = None,
    task_folder: Annotated[Path | None, TASK_FOLDER] = None,
    limit: Annotated[int | None, LIMIT] = None,
    shots: Annotated[int | None, SHOTS] = None,
    batch_size: Annotated[int, BATCH_SIZE] = 1,
    seed: Annotated[int, typer.Option(help="Of the bootstrap intervals and of the tasks' solved examples.")] = 0,
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
        is_speech = is_speech_model(model)
        _check_options(is_speech, reference, stages, calibration, tasks)
        request = TaskRequest(tasks, task_folder, limit, shots, batch_size)
        loaded = request.load()
        if is_speech:
            measured, values = measure_speech(model, reference, data, transcripts, seed)
        elif stages and reference is not None:
            measured, values = measure_stages(model, reference, data, calibration, sequence_length, max_tokens, seed)
        else:
            measured, values = measure_language(model, reference, data, sequence_length, max_tokens, seed)
        values |= request.run(loaded, measured, model, reference, seed)
        values = {"model": model, "reference": reference, **_size(measured), **values, "seed": seed}
        values["seconds"] = time.monotonic() - started
        if save:
            from hf_lowbit.cli.keep import keep_evaluation

            kept = {name: value for name, value in values.items() if name not in _NOT_KEPT}
            named = {
                "--reference": reference,
                "--data": data,
                "--transcripts": transcripts,
                "--calibration": calibration,
            }
            kept["command"] = _command(model, named, {**request.options(), "--stages": stages}, values)
            keep_evaluation(measured, Path(model), kept)
            say(f"the numbers are kept in {model}")
    if json_output:
        print_json(values)
    else:
        _show(values)


def _check_options(
    is_speech: bool, reference: str | None, stages: bool, calibration: str | None, tasks: str | None
) -> None:
    from hf_lowbit.cli.errors import RequestError

    if is_speech and (stages or tasks is not None):
        raise RequestError("--stages and --tasks are for language models, and this is a speech model")
    if stages and reference is None:
        raise RequestError("--stages compares with the float model: add --reference MODEL")
    if calibration is not None and not stages:
        raise RequestError("--calibration is for --stages")


def _size(measured: Any) -> dict[str, Any]:
    """What a plot of several models needs to know of a quantized one."""
    from hf_lowbit import report
    from hf_lowbit.evaluation.points import label_of
    from hf_lowbit.state import state_of

    if state_of(measured) is None:
        return {}
    account = report(measured)
    return {"method": label_of(account), "bits_per_weight": account.bits_per_weight}


def _command(model: str, named: dict[str, Any], others: dict[str, Any], values: dict[str, Any]) -> str:
    """The command that measures the same, for the model card; of local paths only the last part."""
    parts = ["hf-lowbit", "evaluate", Path(model).name]
    for option, value in named.items():
        if value is not None:
            parts += [option, Path(value).name if Path(value).exists() else str(value)]
    for option, value in others.items():
        if value is not None and value is not False:
            parts += [option] if value is True else [option, str(value)]
    for option in ("sequence_length", "max_tokens"):
        if option in values:
            parts += [f"--{option.replace('_', '-')}", str(values[option])]
    return shlex.join([*parts, "--seed", str(values["seed"])])


def _show(values: dict[str, Any]) -> None:
    from hf_lowbit.cli.quality import quality_rows

    compared = f" compared with {values['reference']}" if values["reference"] else ""
    screen().print(f"{values['model']}{compared}", soft_wrap=True, markup=False)
    if "stages" in values:
        show_stages(values["stages"])
        values = {
            name: value
            for name, value in values.items()
            if name not in (*values["stages"]["packed"], "reference_perplexity")
        }
    facts([*quality_rows(values), *task_rows(values), ("time", f"{values['seconds']:.1f} s")])
    for recording, text in zip(values.get("recordings", []), values.get("hypotheses", []), strict=True):
        screen().print(f"\n{recording}: {text}", soft_wrap=True, markup=False)
