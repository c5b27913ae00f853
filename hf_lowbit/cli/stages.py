"""``hf-lowbit evaluate --stages``: a saved model at each stage of its quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from hf_lowbit.cli.console import say, screen, warn
from hf_lowbit.cli.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_lowbit.config import LowbitConfig

STAGES = typer.Option(
    "--stages",
    help="Text: also with the weights just before rounding, and with the rounded ones in float layers (no quantized "
    "inputs). Needs --reference.",
)
CALIBRATION = typer.Option(
    metavar="FILE|DATASET|self",
    help="With --stages: the data that the model was calibrated on, to repeat its quantization.",
    show_default=False,
)

_NEEDS_DATA = (
    "the stage 'transformed' is left out: a packed model no longer has the weights that were rounded; --calibration "
    "with the data that it was calibrated on quantizes the reference again for it"
)
_DIFFERS = (
    "quantizing the reference again gave other codes than the model has (other data, versions or number of threads): "
    "the stage 'transformed' is that of the new run"
)


def measure_stages(
    model: str,
    reference: str,
    data: Path | None,
    calibration: str | None,
    sequence_length: int,
    max_tokens: int,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """The loaded model, and its quality at each stage; the packed one's numbers stand above them, as always.

    The reference is quantized again where that can be done: by a method without data, or with the data given.
    "requantized" says whether that gave the model's codes; None where it was not done.
    """
    from hf_lowbit.cli.measure import evaluation_text, in_float32
    from hf_lowbit.cli.progress import windows
    from hf_lowbit.cli.run import load
    from hf_lowbit.cli.sources import check_data
    from hf_lowbit.method import method_of

    config = _config_of(model)
    check_data(calibration)
    text, name = evaluation_text(data)
    from transformers import AutoTokenizer

    from hf_lowbit.evaluation import evaluate_stages

    tokenizer = AutoTokenizer.from_pretrained(model)
    measured = load(model, "loading the model")
    weights, equal = None, None
    if calibration is None and method_of(config).make_recipe(config).calibrate is not None:
        say(_NEEDS_DATA)
    else:
        weights, equal = _quantize_again(reference, config, calibration, measured)
    measured, compared = in_float32(measured), in_float32(load(reference, "loading the reference"))
    options: dict[str, Any] = {"sequence_length": sequence_length, "max_tokens": max_tokens, "seed": seed}
    with windows(compared, "measuring"):
        values = evaluate_stages(measured, compared, tokenizer, text, weights=weights, **options)
    return measured, {**values, "requantized": equal, "max_tokens": max_tokens, "dtype": "float32", "data": name}


def show_stages(stages: dict[str, dict[str, Any]]) -> None:
    """A table: a row for each stage, 95 % intervals in brackets."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in ("stage", "perplexity", "KL(float || stage), nats per token", "top-1 agreement, %"):
        table.add_column(column)
    for name, values in stages.items():
        kl, agreement = _cell(values, "kl", ".3g"), _cell(values, "top1_agreement", ".1f", 100)
        table.add_row(name, _cell(values, "perplexity", ".3f"), kl, agreement)
    screen().print(table)


def _cell(values: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    if name not in values:
        return ""
    low, high = (format(scale * bound, form) for bound in values["intervals"][name])
    return f"{format(scale * values[name], form)} \\[{low}, {high}]"  # rich would take brackets for a style


def _config_of(model: str) -> LowbitConfig:
    from transformers.utils import cached_file

    from hf_lowbit.cli.account import read_config

    if Path(model).is_dir():
        return read_config(Path(model))
    path = cached_file(model, "config.json")
    if path is None:
        raise RequestError(f"{model} has no config.json: it is no transformers model")
    return read_config(Path(path).parent)


def _quantize_again(
    reference: str, config: LowbitConfig, calibration: str | None, measured: Any
) -> tuple[dict[str, Tensor], bool]:
    from hf_lowbit.cli.fresh import fingerprint
    from hf_lowbit.cli.run import load
    from hf_lowbit.evaluation import quantize_for_stages

    again = load(reference, "loading the reference")
    say("quantizing the reference again, for its weights before rounding")
    weights = quantize_for_stages(again, config, calibration)
    equal = fingerprint(again) == fingerprint(measured)
    if not equal:
        warn(_DIFFERS)
    return weights, equal
