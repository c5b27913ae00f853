"""The recipe of SignRound: a start for every matrix of a block, then all of them trained together."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.reconstruct import Training, reconstruct
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import PackedTensor
from hf_lowbit.method import Recipe
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.gptq import CholeskyError, gptq
from hf_lowbit.rounding.learned import LearnedWeight, SignRounding
from hf_lowbit.rounding.store import round_with
from hf_lowbit_signround.config import SignRoundConfig


def make_recipe(config: SignRoundConfig) -> Recipe:
    """Shifts and ranges of all matrices of a block are trained against the float block's output."""

    def calibrate(block: Block) -> None:
        learned: dict[str, LearnedWeight] = {}
        for key, hessian in block.hessians().items():
            matrix = block.matrices[key]
            if hessian.tokens == 0:
                block.round_to_nearest(key, "no token of the calibration data reaches it: rounded to nearest")
                continue
            start = None if config.start == "nearest" else _start(config.start, matrix, hessian)
            learned[key] = SignRounding(matrix.weight, matrix.spec, start, reach=config.reach)
        if learned:
            reconstruct(block, learned, Training(config.iterations, config.rate, config.optimizer))
        for key, weight in learned.items():
            block.pack(key, weight.pack())

    return Recipe(calibrate=calibrate, targets=True)


def _start(kind: str, matrix: Matrix, hessian: Hessian) -> PackedTensor:
    importance: Tensor = hessian.matrix.diagonal()
    if kind == "gptq":
        try:
            return gptq(matrix.weight, matrix.spec, hessian.matrix, grid_fit=fit_clipped).packed
        except CholeskyError:
            pass  # inputs too alike for GPTQ: its grids still serve
    return round_with(fit_clipped, matrix.weight, matrix.spec, importance)
