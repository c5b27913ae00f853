"""The recipe of GPTQ: the inputs' second moments of each block, then its columns one by one."""

from __future__ import annotations

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.sequence import call_groups
from hf_lowbit.method import Recipe
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.gptq import CholeskyError, gptq
from hf_lowbit_gptq.config import GPTQConfig


def make_recipe(config: GPTQConfig) -> Recipe:
    """Hessians of a block's matrices, all at once or in the order of its layers, then their codes."""

    def calibrate(block: Block) -> None:
        for keys in call_groups(block) if config.true_sequential else [list(block.matrices)]:
            for key, hessian in block.hessians(keys).items():
                matrix = block.matrices[key]
                if hessian.tokens == 0:
                    block.round_to_nearest(key, "no token of the calibration data reaches it: rounded to nearest")
                    continue
                try:
                    result = gptq(
                        matrix.weight,
                        matrix.spec,
                        hessian.matrix,
                        damping=config.damping,
                        act_order=config.act_order,
                        block_size=config.block_size,
                        grid_fit=fit_clipped if config.search_clip else fit_range,
                        static_groups=config.static_groups,
                    )
                except CholeskyError as problem:
                    block.round_to_nearest(key, f"{problem}: rounded to nearest")
                    continue
                if result.damping > config.damping:
                    block.notes[key] = f"its Hessian needed damping={result.damping:g}"
                block.pack(key, result.packed)

    return Recipe(calibrate=calibrate)
