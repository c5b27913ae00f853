"""One row in a process of its own: ``python -m diffusion.worker SETTINGS NAME`` prints its facts as the last line."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections import Counter
from typing import Any

from diffusion.rows import QUICK_SEARCH, SEEDS, Row, all_rows, quick_fields
from diffusion.settings import CALIBRATION_SEED, Settings, calibration_prompts, prompts_of


def run(settings: Settings, row: Row) -> dict[str, Any]:
    """Quantize, draw, measure."""
    import torch

    from diffusion.judge import judge, save_pictures
    from hf_lowbit.evaluation.pictures.drawing import draw_pictures, takes_classes

    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.allow_tf32 = False  # float is float32, on a GPU too
    pipeline = load(settings)
    classes = takes_classes(pipeline)
    facts = size(pipeline)
    if row.method != "float":
        started = time.monotonic()
        facts = quantize(pipeline, settings, row, classes)
        facts["quantize_seconds"] = time.monotonic() - started
        facts |= size(pipeline)
    prompts = prompts_of(classes, settings.images)
    draw_pictures(pipeline, prompts[:2], steps=1)  # what is set up once is not timed
    started = time.monotonic()
    pictures = draw_pictures(
        pipeline, prompts, steps=settings.steps, seed=SEEDS.get(row.name, 0), batch_size=settings.batch_size
    )
    facts["seconds_per_picture"] = (time.monotonic() - started) / len(prompts)
    save_pictures(settings, row.name, pictures)
    return {**facts, **judge(settings, row, pictures, prompts)}


def load(settings: Settings) -> Any:
    """The float pipeline in float32, without bars."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(settings.source, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(settings.device)


def quantize(pipeline: Any, settings: Settings, row: Row, classes: bool) -> dict[str, Any]:
    """In place; facts of how."""
    import hf_lowbit

    config_class = hf_lowbit.methods()[row.method].config_class
    known = {f.name for f in dataclasses.fields(config_class)}
    fields = dict(row.fields)
    if settings.iterations is not None and "iterations" in known and fields.get("iterations") != 0:
        fields["iterations"] = settings.iterations
    if settings.quick:
        fields = {**quick_fields(known), **{k: v for k, v in fields.items() if k not in quick_fields(known) or v == 0}}
    config = config_class(**fields, num_samples=settings.calibration, seed=CALIBRATION_SEED)
    facts: dict[str, Any] = {}
    prompts = calibration_prompts(classes)
    if row.search is not None:
        config, facts = search(pipeline, config, settings, row, prompts)
    output = settings.folder / "pipelines" / row.name if settings.save else None
    hf_lowbit.quantize(
        pipeline, config, prompts=prompts, steps=settings.steps, timesteps=settings.timesteps, output=output
    )
    report = hf_lowbit.report(pipeline)
    arithmetic = Counter(layer.arithmetic for layer in report.layers)
    return {
        **facts,
        "bits_per_weight": report.bits_per_weight,
        "arithmetic": dict(arithmetic.most_common()),
        "skipped": len(report.skipped),
        "notes": report.warnings,
    }


def search(pipeline: Any, config: Any, settings: Settings, row: Row, prompts: list[Any]) -> tuple[Any, dict[str, Any]]:
    """The config with the bits that are found, and what they are."""
    from hf_lowbit.search.pipeline import search_pipeline

    shared = settings.folder / "measurements.json"
    started = time.monotonic()
    options = {**(row.search or {}), **(QUICK_SEARCH if settings.quick else {})}
    found = search_pipeline(
        pipeline, config, prompts, settings.steps, seed=CALIBRATION_SEED, measurements=shared, **options
    )
    chosen = Counter(values.get("bits") for values in (found.config.overrides or {}).values())
    config = dataclasses.replace(found.config, num_samples=settings.calibration, seed=CALIBRATION_SEED)
    return config, {"chosen_bits": dict(chosen), "search_seconds": time.monotonic() - started}


def size(pipeline: Any) -> dict[str, Any]:
    """Bytes of the denoiser as a checkpoint of 16-bit floats holds it: what is packed as it is, the rest in 16 bits."""
    import hf_lowbit
    from hf_lowbit.integrations.loading import pipeline_components
    from hf_lowbit.state import state_of

    models = [getattr(pipeline, name) for name in pipeline_components(pipeline)]
    if any(state_of(model) is not None for model in models):
        report = hf_lowbit.report(pipeline)
        return {"denoiser_bytes": report.packed_bytes + report.other_bytes // 2}  # the rest is float32 here
    return {"denoiser_bytes": 2 * sum(p.numel() for m in models for p in m.parameters()), "bits_per_weight": 16.0}


def main() -> None:
    settings, row = Settings(**json.loads(sys.argv[1])), all_rows()[sys.argv[2]]
    try:
        facts = run(settings, row)
    except Exception as error:  # a row that cannot is a result, too
        traceback.print_exc()
        facts = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
