"""SignRound of a block (arXiv 2309.05516): a start for every matrix, then all of them trained together."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.reconstruct import Training, reconstruct
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.gptq import CholeskyError, gptq
from hf_lowbit.rounding.learned import LearnedWeight, SignRounding
from hf_lowbit.rounding.store import round_with

Choose = Callable[[Matrix, Tensor], WeightSpec]  # a matrix, and the mean of x x^T -> how it will be stored


def sign_round(
    block: Block, training: Training, *, start: str = "gptq", reach: float = 1.0, choose: Choose | None = None
) -> None:
    """Pack a block's matrices after training their shifts and ranges against the float block's output.

    Args:
        start: "gptq": GPTQ's codes on grids with searched clipping; "clip": those grids; "nearest": the plain grid.
        reach: how far a shift may go, in steps.
        choose: the specification of each matrix; None: its own.
    """
    learned: dict[str, LearnedWeight] = {}
    for key, hessian in block.hessians().items():
        matrix = block.matrices[key]
        if hessian.tokens == 0:
            block.round_unreached(key)
            continue
        spec = matrix.spec if choose is None else choose(matrix, hessian.matrix)
        begin = None if start == "nearest" else _start(start, matrix, spec, hessian.matrix)
        learned[key] = SignRounding(matrix.weight, spec, begin, reach=reach)
    if learned:
        reconstruct(block, learned, training)
    for key, weight in learned.items():
        block.pack(key, weight.pack())


def _start(kind: str, matrix: Matrix, spec: WeightSpec, hessian: Tensor) -> PackedTensor:
    if kind == "gptq":
        try:
            return gptq(matrix.weight, spec, hessian, grid_fit=fit_clipped).packed
        except CholeskyError:
            pass  # inputs too alike for GPTQ: its grids still serve
    return round_with(fit_clipped, matrix.weight, spec, hessian.diagonal())
