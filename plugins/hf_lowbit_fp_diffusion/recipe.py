"""The recipe of fp_diffusion: search the grids of weights, learn roundings of the narrow ones, search the inputs'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.adaptive import round_adaptively, start_on_grid
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.floating_point_inputs import search_split
from hf_lowbit.calibration.input_ranges import search_range
from hf_lowbit.calibration.split_rounding import describe_parts
from hf_lowbit.calibration.splitting import split_layers
from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.rounding.floating_point import CLIPS, round_floating_point, search_grid
from hf_lowbit_fp_diffusion.config import FPDiffusionConfig


def make_recipe(config: FPDiffusionConfig) -> Recipe:
    """Weights are trained with inputs as they come; the inputs' formats are found when a block is packed.

    Without data, and without static inputs, weights are rounded to the nearest values of their searched grids.
    """
    clips = CLIPS if config.search_clip else (1.0,)
    parts: dict[str, tuple[int, ...]] = {}

    def rounding(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        if spec.symmetric and spec.format.startswith("fp"):
            return round_floating_point(weight, spec, clips)
        return start_on_grid(weight, spec, config.search_clip)  # a layer that was given another format

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        parts.update(find_concatenations(model, batches[0]))
        return describe_parts(parts)

    def calibrate(block: Block) -> None:
        split_layers(block, parts)
        _share_split(block, clips)
        for key, matrix in block.matrices.items():
            if not config.iterations or matrix.spec.bits > config.learned_bits:
                block.pack(key, rounding(matrix.weight, matrix.spec))

        def start(key: str) -> PackedTensor:
            return rounding(block.matrices[key].weight, block.matrices[key].spec)

        if block.unpacked:
            round_adaptively(block, config.training(quantized_inputs=False), start)

    if not config.calibrates:
        return Recipe(rounding=rounding)
    return Recipe(
        rounding=rounding, calibrate=calibrate, targets=config.learns,
        prepare=prepare if config.split else None, fit_inputs=_fit_inputs,
    )  # fmt: skip


def _fit_inputs(histogram: Any, spec: ActivationSpec) -> tuple[ActivationSpec, Tensor, Tensor | None]:
    """Floating-point formats by their search; of layers that were given another format the range."""
    return (search_range if spec.floating_point is None else search_split)(histogram, spec)


def _share_split(block: Block, clips: Sequence[float]) -> None:
    """Layers of several matrices, experts, have one split: that of their first parameter [ours]."""
    for layer in dict.fromkeys(matrix.layer for matrix in block.matrices.values()):
        own = [matrix for matrix in block.matrices.values() if matrix.layer == layer]
        skeleton, first = own[0].skeleton, own[0]
        if len(own) > 1 and first.spec.format == "fp":
            stack = torch.stack([matrix.weight for matrix in own if matrix.parameter == first.parameter])
            complete = replace(first.spec, format=search_grid(stack, first.spec, clips)[0])
            skeleton.layer_spec = replace(skeleton.layer_spec, weight=complete)
