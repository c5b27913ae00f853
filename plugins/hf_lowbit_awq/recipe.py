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
        hessians = block.hessians() if config.clip else {}
        for key, matrix in block.matrices.items():
            unclipped = first_match(config.never_clip, f"{block.name}.{matrix.layer}") is not None
            if not config.clip or unclipped or key not in hessians or matrix.spec.group_size == "tensor":
                block.pack(key, round_to_nearest(matrix.weight, matrix.spec))
                continue
            fit = fit_output_error(hessians[key].matrix, matrix.spec)
            block.pack(key, round_with(fit, matrix.weight, matrix.spec))

    return Recipe(calibrate=calibrate)
