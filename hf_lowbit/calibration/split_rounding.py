"""The base of Q-Diffusion and QuEST: learned rounding of a block in which concatenated inputs are split."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_lowbit.calibration.adaptive import AdaptiveTraining, round_adaptively, start_on_grid
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.splitting import split_layers
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.plan.patterns import generalise
from hf_lowbit.rounding.parts import round_parts


def round_split(
    block: Block, training: AdaptiveTraining, parts: Mapping[str, tuple[int, ...]], search_clip: bool
) -> None:
    """Train and pack every matrix of a block.

    Args:
        parts: full layer name -> channels of each part of its input
            (:func:`hf_lowbit.calibration.concatenations.find_concatenations`).
        search_clip: see :func:`hf_lowbit.calibration.adaptive.start_on_grid`.
    """
    split = split_layers(block, parts)

    def grid(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        return start_on_grid(weight, spec, search_clip)

    def start(key: str) -> PackedTensor:
        matrix = block.matrices[key]
        if key in split:
            return round_parts(matrix.weight, matrix.spec, split[key], grid)
        return grid(matrix.weight, matrix.spec)

    round_adaptively(block, training, start)


def describe_parts(parts: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for the report, if there are any."""
    names = ", ".join(dict.fromkeys(map(generalise, parts)))
    return [f"scales for each part of a concatenated input: {names} ({len(parts)} layers)"] if parts else []
