"""Whole models, in several calls that each stop by themselves and are taken up by the next."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

from calibrating.memory import Peak
from calibrating.models import drawn, hollow, settings, whole


def full(options: argparse.Namespace) -> dict[str, Any] | None:
    """The model in the host's memory."""
    return resumed(options, options.shape or "8b", lambda shape: (whole(shape), None))


def stream(options: argparse.Namespace) -> dict[str, Any] | None:
    """The model nowhere: blocks are drawn when they are reached."""
    from hf_lowbit.calibration.placement import BlockWeights

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)

    def make(shape: str) -> tuple[Any, BlockWeights]:
        model = hollow(shape)
        layers = dict(hollow(shape).named_modules())
        return model, BlockWeights(lambda name: drawn(layers[name], name), f"drawn, {shape}")

    return resumed(options, options.shape or "30b", make)


def resumed(options: argparse.Namespace, shape: str, make: Callable[[str], tuple[Any, Any]]) -> dict[str, Any] | None:
    """One call of several; facts of all of them once the model is whole, None before."""
    import logging

    import hf_lowbit

    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    begun = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_LOWBIT_HOME"] = str(options.work)
    torch.set_float32_matmul_precision(options.precision[0])
    record = options.work / f"{options.mode}.json"
    calls = json.loads(record.read_text()) if record.is_file() else []
    model, weights = make(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    made = time.monotonic()
    with until(begun + options.seconds) as blocks, Peak() as host:
        hf_lowbit.quantize(model, settings(options.samples), device="cuda", weights=weights)
    calls.append({
        "seconds": time.monotonic() - begun, "of_these_to_make_the_model": made - begun, **blocks,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gpu_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_host_gib": host.largest / 2**30, "pinned_gib": host.pinned / 2**30,
    })  # fmt: skip
    record.write_text(json.dumps(calls))
    print(json.dumps(calls[-1]))
    if blocks["stopped"]:
        print(f"stopped after {options.seconds:g} s; give the same command again")
        return None
    record.unlink()
    report = hf_lowbit.report(model)
    return {
        "shape": shape, "parameters": parameters, "float_gib": 2 * parameters / 2**30, "calls": calls,
        "seconds": sum(call["seconds"] for call in calls), "bits_per_weight": report.bits_per_weight,
        "packed_gib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
        "mean_layer_error": fmean([layer.error for layer in report.layers if layer.error]),
    }  # fmt: skip


class OutOfTime(Exception):
    """The call's seconds are over."""


@contextmanager
def until(end: float) -> Iterator[dict[str, Any]]:
    """Count blocks, and stop after the one during which time runs out."""
    from hf_lowbit.calibration.progress import Progress

    step, counts = Progress.step, {"computed": 0, "taken_over": 0, "stopped": False}

    def counted(progress: Progress, name: str, restored: bool) -> None:
        step(progress, name, restored)
        counts["taken_over" if restored else "computed"] += 1
        if time.monotonic() > end and progress.done < progress.total:
            raise OutOfTime

    with patch.object(Progress, "step", counted):
        try:
            yield counts
        except OutOfTime:
            counts["stopped"] = True
