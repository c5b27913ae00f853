"""The recipe of AdaRound: up or down, for all weights of a block together, on grids that stay."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import Training, output_channels, reconstruct
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.learned import AdaptiveRounding
from hf_lowbit.rounding.store import round_with
from hf_lowbit_adaround.config import AdaRoundConfig


def make_recipe(config: AdaRoundConfig) -> Recipe:
    """Every matrix that tokens reach is trained against the float block's output; the others go to the nearest."""

    def start(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        return round_with(fit_clipped, weight, spec) if config.search_clip else round_to_nearest(weight, spec)

    def calibrate(block: Block) -> None:
        strength = config.regularization / output_channels(block)  # the loss is a mean over channels, not their sum
        learned = {}
        for key, magnitude in block.magnitudes().items():
            matrix = block.matrices[key]
            if magnitude.tokens:
                first = start(matrix.weight, matrix.spec)
                learned[key] = AdaptiveRounding(matrix.weight, matrix.spec, first, regularization=strength)
            else:
                block.round_unreached(key)
        if learned:  # soft weights lose least at the start, where they are the float ones: the last are what counts
            reconstruct(block, learned, Training(config.iterations, config.rate, "adam", keep_best=False, decay=False))
        for key, weight in learned.items():
            block.pack(key, weight.pack())

    return Recipe(calibrate=calibrate, targets=True)
