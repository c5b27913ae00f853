"""One block by its parts, and what the model loses."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from calibrating.models import settings, tokens, whole
from calibrating.parts import Parts


def block(options: argparse.Namespace) -> dict[str, Any]:
    """The parts of the middle one of three blocks: the first warms up, the last hands nothing on."""
    import hf_lowbit
    from hf_lowbit.rounding import feedback

    shape, results = options.shape or "8b", {}
    reference = logits(whole(shape, "cuda", num_hidden_layers=3))
    ways = [(precision, False) for precision in options.precision]
    for precision, loop in [*ways, *([(options.precision[-1], True)] if options.loop else [])]:
        torch.set_float32_matmul_precision(precision)
        model = whole(shape, num_hidden_layers=3)
        with Parts() as parts, patch.object(feedback, "runs_on", lambda _: False) if loop else ExitStack():
            hf_lowbit.quantize(model, settings(options.samples), device="cuda")
        torch.set_float32_matmul_precision("highest")
        moved = model.to("cuda")
        results[f"{precision}{', loop over columns' if loop else ''}"] = {
            "seconds_of_block": parts.blocks[1],
            "logits_error": float((logits(moved) - reference).norm() / reference.norm()),
            "mean_layer_error": fmean([layer.error for layer in hf_lowbit.report(model).layers if layer.error]),
        }
        del model, moved
    return {"shape": shape, "results": results}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """On a sample that was not calibrated on."""
    return model(tokens(1, 1).cuda()).logits.float()
