"""The recipe of NUPES: an exponent per layer, then the nearest of its values."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.power import round_power
from hf_lowbit_nupes.config import NUPESConfig


def make_recipe(config: NUPESConfig) -> Recipe:
    """Power tables, their exponents searched where none is given; to nearest where an override names another format."""

    def rounding(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        return round_power(weight, spec) if spec.format == "power" else round_to_nearest(weight, spec)

    return Recipe(rounding=rounding)
