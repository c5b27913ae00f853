"""The recipe of GPTQ: the inputs' second moments of each block, then its columns one by one."""

from __future__ import annotations

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.rotating import rotating
from hf_lowbit.calibration.second_order import as_read, round_second_order
from hf_lowbit.calibration.sequence import call_groups
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.method import Recipe
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit_gptq.config import GPTQConfig


def make_recipe(config: GPTQConfig) -> Recipe:
    """Hessians of a block's matrices, all at once or in the order of its layers, then their codes."""

    def rounding(matrix: Matrix, statistic: Hessian) -> GPTQResult:
        return gptq(
            matrix.weight,
            matrix.spec,
            as_read(matrix, statistic),
            damping=config.damping,
            act_order=config.act_order,
            block_size=config.block_size,
            grid_fit=fit_clipped if config.search_clip else fit_range,
            static_groups=config.static_groups,
        )

    def calibrate(block: Block) -> None:
        for keys in call_groups(block) if config.true_sequential else [None]:
            round_second_order(block, rounding, config.damping, keys)

    return Recipe(calibrate=calibrate, prepare=rotating(config.rotate, config.seed))
