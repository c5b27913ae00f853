"""The recipe of NUPES: an exponent per layer, then the nearest of its values; or both trained block by block."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.power import round_power
from hf_lowbit_nupes.config import NUPESConfig


def make_recipe(config: NUPESConfig) -> Recipe:
    """Power tables, their exponents searched where none is given; to nearest where an override names another format."""

    def rounding(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        return round_power(weight, spec) if spec.format == "power" else round_to_nearest(weight, spec)

    def calibrate(block: Block) -> None:
        from hf_lowbit_nupes.learning import learn  # the data-free half needs none of it

        learn(block, config)

    return Recipe(rounding=rounding, calibrate=calibrate if config.learn else None, targets=config.learn)
