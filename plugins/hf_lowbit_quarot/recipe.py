"""The recipe of QuaRot: rotate the model, then each block's heads and remaining inputs, then round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.heads import online_hadamard, rotate_heads
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.rotating import rotate_stream
from hf_lowbit.calibration.second_order import as_read, round_second_order
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.method import Recipe
from hf_lowbit.nn import LayerSpec, PackedLinear
from hf_lowbit.rounding.clip import GridFit, fit_clipped, fit_range
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit.rounding.store import round_with
from hf_lowbit_quarot.config import QuaRotConfig


def make_recipe(config: QuaRotConfig) -> Recipe:
    """What neither the stream's rotation nor a transform reaches is quantized as it is, and noted."""
    rotated: set[str] = set()

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        done = rotate_stream(model, batches, config.seed)
        rotated.update(done.readers)
        return done.notes

    def rounding(matrix: Matrix, statistic: Hessian) -> GPTQResult:
        hessian = as_read(matrix, statistic)
        return gptq(matrix.weight, matrix.spec, hessian, damping=config.damping, grid_fit=_grids(config))

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        left = transform_inputs(block, rotated, config)
        if config.weights == "gptq":
            round_second_order(block, rounding, config.damping)
        for key in block.unpacked if config.weights == "nearest" else ():
            matrix = block.matrices[key]
            block.pack(key, round_with(_grids(config), matrix.weight, matrix.spec))
        for key in left:
            whole = key.partition("[")[0]  # once for all experts
            block.notes.setdefault(whole, "layers of its kind have no transforms: its inputs are quantized as they are")

    return Recipe(calibrate=calibrate, prepare=prepare)


def transform_inputs(block: Block, rotated: Collection[str], config: QuaRotConfig) -> list[str]:
    """Rotate every input that is not rotated yet and has to be; returns keys of the matrices where that is impossible.

    Args:
        rotated: full names of the layers that read a rotated stream.
    """
    waiting: dict[str, PackedLinear] = {}
    left: list[str] = []
    for key, matrix in block.matrices.items():
        name = f"{block.name}.{matrix.layer}" if matrix.layer else block.name
        reads_stream = name in rotated and matrix.parameter != "down_proj"
        if reads_stream or not _is_wanted(matrix.layer_spec, config):
            continue
        if isinstance(matrix.skeleton, PackedLinear):
            waiting[matrix.layer] = matrix.skeleton
        else:
            left.append(key)
    heads = rotate_heads(block) if waiting else {}
    for name, layer in waiting.items():
        if (transform := online_hadamard(layer.in_features, heads.get(name))) is not None:
            layer.set_transform(transform)
    return left


def _is_wanted(spec: LayerSpec, config: QuaRotConfig) -> bool:
    return spec.activation is not None if config.online is None else config.online


def _grids(config: QuaRotConfig) -> GridFit:
    return fit_clipped if config.search_clip else fit_range
