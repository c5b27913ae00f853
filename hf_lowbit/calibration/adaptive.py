"""Adaptive rounding of a whole block: the step that AdaRound, Q-Diffusion and QuEST share.

All weights of a block are rounded up or down together, until it returns what the float block did (AdaRound, arXiv
2004.10568, in BRECQ's setting, arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import Training, output_channels, reconstruct
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.learned import AdaptiveRounding
from hf_lowbit.rounding.store import round_with

Start = Callable[[str], PackedTensor]


@dataclass(frozen=True)
class AdaptiveTraining:
    """How the roundings of a block are trained.

    Attributes:
        iterations: steps, each on one batch.
        learning_rate: of the logits, for Adam; constant.
        regularization: lambda, the weight of the penalty on undecided roundings beside the error of the block's output,
            which is summed over channels.
        quantized_inputs: whether layers read quantized inputs while they are trained; False: weights come first, as in
            Q-Diffusion's and QuEST's code, and inputs after them.
        scale_aware: as :class:`hf_lowbit.rounding.learned.AdaptiveRounding`.
    """

    iterations: int
    learning_rate: float
    regularization: float = 0.01
    quantized_inputs: bool = True
    scale_aware: bool = False


def round_adaptively(block: Block, training: AdaptiveTraining, start: Start) -> None:
    """Train and pack every matrix that tokens reach; the others go to the nearest, and are noted.

    Args:
        start: key -> the matrix on the grid that is used; its codes are not.
    """
    strength = training.regularization / output_channels(block)  # the loss is a mean over channels, not their sum
    learned = {}
    for key, magnitude in block.magnitudes().items():
        matrix = block.matrices[key]
        if magnitude.tokens:
            first = start(key)  # its specification may complete the matrix'
            learned[key] = AdaptiveRounding(
                matrix.weight, first.spec, first, regularization=strength, scale_aware=training.scale_aware
            )
        else:
            block.round_unreached(key)
    if learned:  # soft weights lose least at the start, where they are the float ones: the last are what counts
        steps = Training(
            training.iterations, training.learning_rate, "adam",
            keep_best=False, decay=False, quantized_inputs=training.quantized_inputs,
        )  # fmt: skip
        reconstruct(block, learned, steps)
    for key, weight in learned.items():
        block.pack(key, weight.pack())


def start_on_grid(weight: Tensor, spec: WeightSpec, search_clip: bool) -> PackedTensor:
    """The weight ``[rows, columns]`` on the grids of the best clipped ranges, as in BRECQ's code, or of whole ones."""
    return round_with(fit_clipped, weight, spec) if search_clip else round_to_nearest(weight, spec)
