"""The recipe of SmoothQuant: fold a scale after every norm, round to nearest."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.scaling import smooth
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_smoothquant.config import SmoothQuantConfig


def make_recipe(config: SmoothQuantConfig) -> Recipe:
    """Only inputs that come from a norm are smoothed, as in the authors' code."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        smooth(block, config.alpha)
        for key, matrix in block.matrices.items():
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))

    return Recipe(calibrate=calibrate)
