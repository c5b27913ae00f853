"""The recipe of Quamba: norms without gain, the scan's output rotated, weights to nearest, then the scales of sites."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.mixers import fold_gains, pack_mixers, rotate_outputs
from hf_lowbit.calibration.rotating import rotating
from hf_lowbit.calibration.state_space import set_mixer_scales
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_quamba.config import QuambaConfig


def make_recipe(config: QuambaConfig) -> Recipe:
    """The scales of what the projections at both ends read are the platform's: the largest input, after a transform."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        fold_gains(block)
        if config.hadamard:
            rotate_outputs(block)
        pack_mixers(block)
        for key in block.unpacked:
            matrix = block.matrices[key]
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))
        set_mixer_scales(block, config.percentile, config.percentile_sigma, config.state_percentile)

    return Recipe(calibrate=calibrate, prepare=rotating(config.rotate, config.seed))
