"""The recipe of SpQR: the inputs' second moments of each block, then codes and outliers of its matrices."""

from __future__ import annotations

import math

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.second_order import round_second_order
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import decode
from hf_lowbit.method import Recipe
from hf_lowbit.nn import keep_weights
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit.rounding.spqr import SpQRResult, spqr
from hf_lowbit_spqr.config import SpQRConfig

_MANY = 0.05  # of a matrix' weights: beyond what the authors report for any setting


def make_recipe(config: SpQRConfig) -> Recipe:
    """SpQR where a layer can keep exact weights, GPTQ elsewhere."""

    def calibrate(block: Block) -> None:
        def rounding(matrix: Matrix, statistic: Hessian) -> GPTQResult | SpQRResult:
            if reason := _why_gptq(matrix):
                block.note(matrix.key, reason)
                return gptq(
                    matrix.weight,
                    matrix.spec,
                    statistic.matrix,
                    act_order=config.act_order,
                    static_groups=config.act_order,
                )
            result = spqr(
                matrix.weight,
                matrix.spec,
                statistic.matrix,
                outlier_threshold=math.inf if config.outlier_threshold is None else config.outlier_threshold,
                damping=config.damping,
                act_order=config.act_order,
                leave_one_out=config.leave_one_out,
                block_size=config.block_size,
            )
            share = len(result.values) / result.outliers.numel()
            if share > _MANY:
                block.note(
                    matrix.key,
                    f"keeps {share:.0%} of its weights exact, 32 bits each: raise outlier_threshold, or damping",
                )
            _keep(matrix, result)
            return result

        round_second_order(block, rounding, config.damping)

    return Recipe(calibrate=calibrate)


def _why_gptq(matrix: Matrix) -> str | None:
    """Why a matrix is left to GPTQ; None if it is not."""
    if not matrix.skeleton.takes_exact:
        return f"layers of kind {matrix.skeleton.kind!r} keep no exact weights: rounded by GPTQ, without outliers"
    if matrix.spec.symmetric or matrix.spec.format != "int" or matrix.spec.bits == 1:
        return "SpQR rounds to integers with zero points: rounded by GPTQ, without outliers"
    return None


def _keep(matrix: Matrix, result: SpQRResult) -> None:
    if len(result.values):
        decoded = decode(result.packed)
        wanted = decoded.masked_scatter(result.outliers, result.values.float())
        matrix.skeleton.set_exact(*keep_weights(wanted, decoded, result.outliers))
