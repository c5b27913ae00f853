"""The recipe of SignRound: the platform's block-wise training, with the config's settings."""

from __future__ import annotations

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import Training
from hf_lowbit.calibration.rotating import rotating
from hf_lowbit.calibration.sign_rounding import sign_round
from hf_lowbit.method import Recipe
from hf_lowbit_signround.config import SignRoundConfig


def make_recipe(config: SignRoundConfig) -> Recipe:
    """Shifts and ranges of all matrices of a block are trained against the float block's output."""
    training = Training(config.iterations, config.rate, config.optimizer)

    def calibrate(block: Block) -> None:
        sign_round(block, training, start=config.start, reach=config.reach)

    return Recipe(calibrate=calibrate, prepare=rotating(config.rotate, config.seed), targets=True)
