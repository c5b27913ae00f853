"""The recipe of auto: rotate, choose bits; then per block choose formats and round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.reconstruct import Training
from hf_lowbit.calibration.rotating import rotate_stream
from hf_lowbit.calibration.second_order import as_read, round_second_order
from hf_lowbit.calibration.sign_rounding import sign_round
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.method import Recipe
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.gptq import GPTQResult, gptq
from hf_lowbit_auto.config import AutoLowbitConfig
from hf_lowbit_auto.number_formats import chooser


def make_recipe(config: AutoLowbitConfig) -> Recipe:
    """Its choices are lines of the report; bits and formats of each layer are in the plan."""
    choose = chooser(config.formats)

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        notes = rotate_stream(model, batches, config.seed).notes if config.rotates else []
        notes += _explained(config)
        if config.bits_per_weight is not None:
            notes.append(choose_bits(model, config, batches))
        return notes

    def rounding(matrix: Matrix, statistic: Hessian) -> GPTQResult:
        hessian = as_read(matrix, statistic)
        return gptq(matrix.weight, choose(matrix, hessian), hessian, grid_fit=fit_clipped)

    def calibrate(block: Block) -> None:
        if config.trains_blocks:
            sign_round(block, Training(config.iterations, 0.5 / config.iterations), choose=choose)
        else:
            round_second_order(block, rounding)

    return Recipe(calibrate=calibrate, prepare=prepare, targets=config.trains_blocks, mixed_precision=True)


def choose_bits(model: nn.Module, config: AutoLowbitConfig, batches: Sequence[dict[str, Any]]) -> str:
    """Give the config the bits of every layer as overrides; a line for the report.

    Raises:
        AllocationError: a budget that the candidates cannot meet.
    """
    from hf_lowbit.search import on_batches, search  # it stands above what a recipe needs otherwise

    assert config.bits_per_weight is not None
    result = search(model, on_batches(config, batches), None, config.bits_per_weight, config.candidates)
    config.overrides = result.config.overrides
    layers = Counter(group.bits for group in result.groups for _ in group.layers)
    shares = ", ".join(f"{layers[bits]} with {bits} bits" for bits in sorted(layers))
    return (
        f"auto: of {sum(layers.values())} layers {shares}: {result.bits_per_weight:.3f} bits per weight of at most "
        f"{config.bits_per_weight:g}, chosen by each layer's second-order loss"
    )


def _explained(config: AutoLowbitConfig) -> list[str]:
    trained, rounded = f"SignRound, {config.iterations} iterations from GPTQ's codes", "GPTQ on searched grids"
    how = f"auto: weights are rounded by {trained if config.trains_blocks else rounded}"
    formats = " or ".join(config.formats)
    lines = [f"{how}; layers of 2 to 4 bits take {formats}, what loses less on their inputs"]
    if config.low_rank is None:
        lines.append("auto: no low-rank branch: bits of codes bought more where it was measured; low_rank adds one")
    return lines
