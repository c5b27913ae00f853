"""The recipe of Q-Diffusion: find the skip connections, split what reads them, learn each block's roundings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.input_ranges import search_range
from hf_lowbit.calibration.split_rounding import describe_parts, round_split
from hf_lowbit.method import Recipe
from hf_lowbit_q_diffusion.config import QDiffusionConfig


def make_recipe(config: QDiffusionConfig) -> Recipe:
    """Weights are trained with inputs as they come; the inputs' scales are found when a block is packed."""
    parts: dict[str, tuple[int, ...]] = {}

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        if config.split:
            parts.update(find_concatenations(model, batches[0]))
        return describe_parts(parts)

    def calibrate(block: Block) -> None:
        round_split(block, config.training(quantized_inputs=False), parts, config.search_clip)

    return Recipe(
        calibrate=calibrate, targets=True, prepare=prepare, fit_inputs=search_range if config.search_inputs else None
    )
