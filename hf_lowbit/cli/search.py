"""``hf-lowbit search``: mixed precision within a budget of bits per weight, of a model or of a pipeline."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_lowbit.cli.app import command
from hf_lowbit.cli.console import facts, print_json, screen, work
from hf_lowbit.cli.options import CONFIG_FILE, DATA, GROUP_SIZE, METHOD

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig
    from hf_lowbit.search import SearchResult


@command("search")
def search_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder or a repository: a model, or a diffusion pipeline.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="JSON file for the config; hf-lowbit quantize --config takes it.", show_default=False),
    ],
    data: Annotated[str | None, DATA] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            help="The most that may be stored for the quantized layers, scales included; of a pipeline, without them.",
            show_default="3.25; 4 of a pipeline",
        ),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Bits to choose from.", show_default="2,3,4,8; 2,4,8 of a pipeline")
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ranks of a low-rank branch to choose from as well, as 0,8,16,32: they share the budget with bits.",
            show_default="none",
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT|quarter",
            help="Instead of bits: which so many blocks gain most from better fields (W4AX of quamba2).",
            show_default="none",
        ),
    ] = None,
    better: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="Of --blocks: what these get, as in overrides: --better bits=8. May be repeated.",
            show_default="activation_bits=none",
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="What a layer loses: hessian (its block's output), output (its own), or kl (the model's predictions: "
            "most faithful, slowest)."
        ),
    ] = "hessian",
    method: Annotated[str | None, METHOD] = None,
    group_size: Annotated[str | None, GROUP_SIZE] = None,
    number_format: Annotated[
        str | None, typer.Option("--format", help="Number format: int, nf, power, ...", show_default="int")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of the method: --set num_samples=32. Bits that overrides give are kept: "
            "--set overrides.lm_head.bits=8. May be repeated.",
        ),
    ] = None,
    config_file: Annotated[Path | None, CONFIG_FILE] = None,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="MODEL must be a pipeline; one is known as such without this.")
    ] = False,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="Of a pipeline, instead of data: what is drawn. A prompt, or a .txt file with one in each line; a "
            "class label where the pipeline draws classes. May be repeated.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of these pictures.", min=1)] = 25,
    call: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other argument of the pipeline's call: --call guidance_scale=5."),
    ] = None,
    bits_per_input: Annotated[
        float,
        typer.Option(help="Of a pipeline: mean bits of inputs, full precision counted as 16; 0 for weights alone."),
    ] = 8.0,
    pictures: Annotated[int, typer.Option(help="Of a pipeline: so many prompts are drawn for each measurement.")] = 8,
    objective: Annotated[
        str, typer.Option(help="Of a pipeline: score (sums of SSIM and dB, as in the paper), or noise (summed power).")
    ] = "score",
    component: Annotated[
        str | None, typer.Option(help="Part of a pipeline to search.", show_default="its denoiser")
    ] = None,
    measurements: Annotated[
        Path | None,
        typer.Option(
            help="Of a pipeline: a JSON file of finished measurements, from which a killed search, or one of another "
            "budget, goes on.",
            show_default="beside the output",
        ),
    ] = None,
    fuse: Annotated[
        bool, typer.Option(help="The same bits for layers that kernels run as one: query, key and value; gate and up.")
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the bits of every layer that lose least within a budget, or the blocks that are worth more than others, and
    write a config for quantize.
    """
    started = time.monotonic()
    with work():
        from hf_lowbit.cli.settings import build_config
        from hf_lowbit.cli.sources import check_data, check_model
        from hf_lowbit.method import method_of

        check_model(model)
        fields = {"group_size": group_size, "format": number_format}
        is_pipeline = _is_pipeline(model, pipeline)
        if is_pipeline:
            from hf_lowbit.cli.search_pipeline import search_to

            refused = {"--data": data, "--ranks": ranks, "--blocks": blocks, "--better": better}
            _refuse("a pipeline", refused, "it draws what it is measured on: give --prompts")
            named = method or ("mixdq" if config_file is None else None)
            config = build_config(named, config_file, fields, assignments or [])
            _check_output(output)
            settings = {
                "steps": steps, "bits_per_weight": 4.0 if bits_per_weight is None else bits_per_weight,
                "bits_per_input": bits_per_input or None, "pictures": pictures, "objective": objective,
                "component": component,
                "candidates": _parse_numbers("--candidates", candidates or "2,4,8", "bits", "2,4,8"),
            }  # fmt: skip
            kept = measurements or output.with_suffix(".measurements.json")
            drawn = search_to(model, config, output, prompts or [], call or [], kept, settings)
        else:
            _refuse(
                "no pipeline", {"--prompts": prompts, "--call": call, "--measurements": measurements}, "give --data"
            )
            _check_given(data)
            config = build_config(method, config_file, fields, assignments or [])
        if blocks is not None and not is_pipeline:
            from hf_lowbit.cli.search_blocks import search_blocks_to

            _refuse(
                "searched by --blocks",
                {"--bits-per-weight": bits_per_weight, "--candidates": candidates, "--ranks": ranks},
                "bits are given by the config",
            )
            _check_output(output)
            check_data(data)
            chosen = search_blocks_to(model, config, str(data), blocks, better or [], output)
        elif not is_pipeline:
            _refuse("searched without --blocks", {"--better": better}, "it says what chosen blocks get")
            bits = _parse_numbers("--candidates", candidates or "2,3,4,8", "bits", "2,3,4,8")
            chosen_ranks = None if ranks is None else _parse_numbers("--ranks", ranks, "ranks", "0,8,16,32")
            budget = 3.25 if bits_per_weight is None else bits_per_weight
            _check_output(output)
            check_data(data)
            result = _search(model, config, str(data), budget, bits, metric, fuse, chosen_ranks)
            output.write_text(json.dumps(result.config.to_dict(), indent=2) + "\n", encoding="utf-8")
            calibrates = method_of(config).make_recipe(result.config).calibrate is not None
        seconds = time.monotonic() - started
    if is_pipeline:
        from hf_lowbit.cli.search_pipeline import show

        show(drawn, model, output, kept, seconds, json_output)
        return
    if blocks is not None:
        from hf_lowbit.cli.search_blocks import show_blocks

        show_blocks(chosen, model, str(data), better or [], output, seconds, json_output)
        return
    if json_output:
        print_json({**result.to_dict(), "model": model, "output": str(output), "command_seconds": seconds})
        return
    screen().print(_table(result))
    reached = f"{result.bits_per_weight:.4f} of at most {budget:g}"
    facts([("bits per weight", reached), ("metric", metric), ("total loss", f"{result.loss:.4g}")])
    screen().print(
        f"Written to {output} in {seconds:.1f} s; next: hf-lowbit quantize {model} --config {output} "
        f"{f'--data {data} ' if calibrates else ''}--output DIR",
        soft_wrap=True,
        markup=False,
    )


def _search(
    model: str,
    config: LowbitConfig,
    data: str,
    budget: float,
    bits: list[int],
    metric: str,
    fuse: bool,
    ranks: list[int] | None,
) -> SearchResult:
    from torch import nn

    from hf_lowbit.allocation import AllocationError
    from hf_lowbit.calibration.divergence import SensitivityError
    from hf_lowbit.cli.errors import RequestError
    from hf_lowbit.cli.run import load
    from hf_lowbit.search import METRICS, search
    from hf_lowbit.suggestion import unknown

    if metric not in METRICS:
        raise RequestError(unknown("metric", metric, METRICS))
    loaded = load(model, "loading")
    assert isinstance(loaded, nn.Module)
    try:
        return search(loaded, config, data, budget, bits, metric, fuse=fuse, ranks=ranks)
    except (AllocationError, SensitivityError) as error:
        raise RequestError(str(error)) from None


def _is_pipeline(model: str, asked: bool) -> bool:
    from hf_lowbit.cli.errors import RequestError
    from hf_lowbit.integrations.loading import is_pipeline

    found = is_pipeline(model)
    if asked and not found:
        raise RequestError(f"{model} is no pipeline: it has no model_index.json; leave --pipeline out")
    return found


def _check_given(data: str | None) -> None:
    from hf_lowbit.cli.errors import RequestError

    if data is None:
        raise RequestError("a search needs calibration data: add --data FILE, DATASET or self")


def _refuse(what: str, options: dict[str, Any], remedy: str) -> None:
    from hf_lowbit.cli.errors import RequestError

    for option, value in options.items():
        if value is not None:
            raise RequestError(f"{option} is not for what is {what}: {remedy}")


def _parse_numbers(option: str, text: str, what: str, example: str) -> list[int]:
    from hf_lowbit.cli.errors import RequestError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RequestError(f"{option} takes {what} separated by commas, such as {example}, not {text!r}")
    return [int(part) for part in parts]


def _check_output(output: Path) -> None:
    """Before minutes of work: the file can be written."""
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; --output names the JSON file to write")
    if output.exists():
        raise FileExistsError(f"{output} exists already; name a new file")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(output.parent)!r} to write {output.name} in")


def _table(result: SearchResult) -> Table:
    """One row per group of layers, with the loss of every candidate."""
    widths = sorted({bits for group in result.groups for bits in group.losses})
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layers", overflow="fold")
    ranked = ["rank"] if any(group.ranks for group in result.groups) else []
    for column in ("weights", "bits", *ranked, *(f"loss at {bits}" for bits in widths)):
        table.add_column(column, justify="right")
    for group in result.groups:
        losses = [f"{group.losses[bits]:.2g}" if bits in group.losses else "" for bits in widths]
        chosen = f"{group.bits} (given)" if group.fixed else str(group.bits)
        ranks = list(group.ranks.values())
        shown = [", ".join(map(str, ranks[:1] if len(set(ranks)) == 1 else ranks))] if ranked else []
        table.add_row(escape(_group_name(group.layers)), f"{group.elements:,}", chosen, *shown, *losses)
    return table


def _group_name(layers: tuple[str, ...]) -> str:
    """Names of siblings as ``parent.{a, b}``."""
    parents: dict[str, list[str]] = {}
    for name in layers:
        parent, _, child = name.rpartition(".")
        parents.setdefault(parent, []).append(child)
    shown: list[Any] = [
        ".".join(part for part in (parent, children[0] if len(children) == 1 else f"{{{', '.join(children)}}}") if part)
        for parent, children in parents.items()
    ]
    return ", ".join(shown[:2]) + (f" and {len(layers) - 2} more" if len(shown) > 2 else "")
