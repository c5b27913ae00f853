"""The recipe of AWQ: search and fold scales, search clipping ranges, round to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.scaling import search_scales
from hf_lowbit.formats import decode
from hf_lowbit.method import Recipe
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.clip import fit_output_error
from hf_lowbit.rounding.store import round_with
from hf_lowbit_awq.config import AWQConfig


def make_recipe(config: AWQConfig) -> Recipe:
    """Scales by search, ranges by search, codes by the nearest value."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        def quantize(key: str, weight: Tensor) -> Tensor:
            return decode(round_to_nearest(weight, block.matrices[key].spec))

        if config.scale_steps > 1:
            search_scales(block, quantize, config.scale_steps)
        clipped = [key for key in block.matrices if _is_clipped(config, block, key)]
        for key, hessian in (block.hessians(clipped) if clipped else {}).items():
            if hessian.tokens == 0:
                block.round_unreached(key)
                continue
            matrix = block.matrices[key]
            block.pack(key, round_with(fit_output_error(hessian.matrix, matrix.spec), matrix.weight, matrix.spec))
        for key in block.unpacked:
            matrix = block.matrices[key]
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))

    return Recipe(calibrate=calibrate)


def _is_clipped(config: AWQConfig, block: Block, key: str) -> bool:
    """Whether a matrix' ranges are searched, by its layer's full name."""
    name = ".".join(part for part in (block.name, block.matrices[key].layer) if part)
    return config.clip and first_match(config.never_clip, name) is None
