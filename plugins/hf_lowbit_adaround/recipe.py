"""The recipe of AdaRound: up or down, for all weights of a block together, on grids that stay."""

from __future__ import annotations

from hf_lowbit.calibration.adaptive import round_adaptively, start_on_grid
from hf_lowbit.calibration.block import Block
from hf_lowbit.formats import PackedTensor
from hf_lowbit.method import Recipe
from hf_lowbit_adaround.config import AdaRoundConfig


def make_recipe(config: AdaRoundConfig) -> Recipe:
    """Every matrix that tokens reach is trained against the float block's output; the others go to the nearest."""

    def calibrate(block: Block) -> None:
        def start(key: str) -> PackedTensor:
            matrix = block.matrices[key]
            return start_on_grid(matrix.weight, matrix.spec, config.search_clip)

        round_adaptively(block, config.training(quantized_inputs=True), start)

    return Recipe(calibrate=calibrate, targets=True)
