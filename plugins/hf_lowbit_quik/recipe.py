"""The recipe of QUIK: choose each layer's outlier columns, round the others by GPTQ, let the outliers absorb errors."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.reassembling import Similarity
from hf_lowbit.calibration.second_order import round_second_order
from hf_lowbit.formats import decode
from hf_lowbit.method import Recipe
from hf_lowbit.nn import keep_columns
from hf_lowbit.rounding.absorption import absorption
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit_quik.config import QUIKConfig


def make_recipe(config: QUIKConfig) -> Recipe:
    """Experts and convolutions keep no columns: their weights are rounded by GPTQ alone, and noted."""

    def calibrate(block: Block) -> None:
        def rounding(matrix: Matrix, statistic: Similarity) -> GPTQResult:
            if not matrix.skeleton.takes_exact and config.outliers:
                kind = matrix.skeleton.kind
                block.note(matrix.key, f"layers of kind {kind!r} keep no outlier columns: GPTQ alone")
            return quantize(matrix, statistic, config)

        round_second_order(block, rounding, config.damping, make=Similarity)

    return Recipe(calibrate=calibrate)


def quantize(matrix: Matrix, statistic: Similarity, config: QUIKConfig) -> GPTQResult:
    """Codes of a matrix; its layer is told which columns it keeps, with the errors they absorbed.

    Raises:
        CholeskyError: a Hessian that no damping makes positive definite.
    """
    weight, hessian = matrix.weight, statistic.matrix
    index = outlier_columns(statistic.maximum, config) if matrix.skeleton.takes_exact else None
    absorbing = None if index is None else absorption(hessian, index, config.damping)
    result = gptq(
        weight,
        matrix.spec,
        hessian if absorbing is None else absorbing.hessian,
        damping=config.damping,
        act_order=config.act_order,
        grid_fit=fit_clipped if config.search_clip else fit_range,
    )
    if absorbing is not None:
        kept = weight.index_copy(1, absorbing.kept, absorbing.absorbed(weight, decode(result.packed)))
        matrix.skeleton.set_exact(*keep_columns(kept, absorbing.kept))
    return result


def outlier_columns(largest: Tensor, config: QUIKConfig) -> Tensor | None:
    """Ascending index of the channels with the largest |x| ``[channels]``; None where none are kept."""
    count = config.kept_columns(len(largest))
    if not count or float(largest.max()) <= config.threshold:
        return None
    return largest.topk(count).indices.sort().values
