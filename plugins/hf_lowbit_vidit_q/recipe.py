"""The recipe of ViDiT-Q: balance each input with what reads it, round to nearest."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.balancing import balance_inputs
from hf_lowbit.calibration.block import Block
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_vidit_q.config import ViDiTQConfig


def make_recipe(config: ViDiTQConfig) -> Recipe:
    """All of a block is balanced before any of it is packed: a folded scale changes the layer before."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        few_bits = any(matrix.spec.bits < 8 for matrix in block.matrices.values())
        balanced = few_bits if config.balance is None else config.balance
        if balanced or config.rotate:
            balance_inputs(block, config.alpha if balanced else None, config.rotate)
        for key, matrix in block.matrices.items():
            block.pack(key, round_to_nearest(matrix.weight, matrix.spec))

    return Recipe(calibrate=calibrate)
