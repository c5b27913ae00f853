"""``hf-lowbit search`` of a pipeline: what is asked, what was found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hf_lowbit.cli.console import facts, print_json, screen

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig
    from hf_lowbit.search.pipeline import LayerChoice, PipelineSearchResult


def search_to(
    model: str,
    config: LowbitConfig,
    output: Path,
    prompts: list[str],
    call: list[str],
    measurements: Path,
    settings: dict[str, Any],
) -> PipelineSearchResult:
    """Search the bits of a pipeline's denoiser, and write the config.

    Args:
        prompts, call: as on the command line.
        settings: of :func:`hf_lowbit.search_pipeline`.

    Raises:
        RequestError: no prompts, or a budget that cannot be met.
    """
    import torch

    from hf_lowbit.allocation import AllocationError
    from hf_lowbit.cli.errors import RequestError
    from hf_lowbit.cli.prompts import read_prompts
    from hf_lowbit.cli.run import load
    from hf_lowbit.cli.settings import parse_call
    from hf_lowbit.kernels.routes import multiplies_fast
    from hf_lowbit.search.pipeline import search_pipeline

    texts, arguments = read_prompts(prompts), parse_call(call)
    try:
        pipeline = load(model, "loading")
        if not multiplies_fast(pipeline.dtype):
            pipeline.to(torch.float32)
        result = search_pipeline(pipeline, config, texts, measurements=measurements, **settings, **arguments)
    except AllocationError as error:
        raise RequestError(str(error)) from None
    output.write_text(json.dumps(result.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return result


def show(
    result: PipelineSearchResult, model: str, output: Path, measurements: Path, seconds: float, json_output: bool
) -> None:
    """What was found, and what comes next."""
    if json_output:
        kept = {"output": str(output), "measurements": str(measurements)}
        print_json({**result.to_dict(), "model": model, **kept, "command_seconds": seconds})
        return
    _show_table(result)
    screen().print(
        f"Written to {output} in {seconds:.1f} s; measurements are kept in {measurements}; next: hf-lowbit quantize "
        f"{model} --config {output} --prompts FILE --output DIR",
        soft_wrap=True,
        markup=False,
    )


def _show_table(result: PipelineSearchResult) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("group", "layers", "weights", "bits", "weights of", "inputs of"):
        table.add_column(column, justify="left" if column in ("group", "weights of", "inputs of") else "right")
    for group in dict.fromkeys(layer.group for layer in result.layers):
        own = [layer for layer in result.layers if layer.group == group]
        elements = sum(layer.elements for layer in own)
        mean = sum(layer.bits * layer.elements for layer in own) / elements
        table.add_row(group, str(len(own)), f"{elements:,}", f"{mean:.3f}", _widths(own), _input_widths(own))
    screen().print(table)
    drawn = min((c.pixel_error for c in result.candidates if c.what == "weights"), default=None)
    rows = [
        ("bits per weight", f"{result.mean_bits:.4f}, scales not counted, of {result.budget:g}"),
        ("bits per input", f"{result.mean_input_bits:.4f}"),
        ("candidates drawn", str(len(result.candidates))),
    ]
    facts(rows if drawn is None else [*rows, ("pixel error of the weights", f"{drawn:.3g}")])
    for note in result.notes:
        screen().print(f"note: {note}", soft_wrap=True, markup=False)


def _widths(layers: list[LayerChoice]) -> str:
    counts = Counter(layer.bits for layer in layers)
    return ", ".join(f"{bits} bits: {counts[bits]}" for bits in sorted(counts))


def _input_widths(layers: list[LayerChoice]) -> str:
    counts = Counter(16 if layer.input_bits is None else layer.input_bits for layer in layers)
    return ", ".join(f"{'full' if bits == 16 else f'{bits} bits'}: {counts[bits]}" for bits in sorted(counts))
