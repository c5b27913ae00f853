"""The recipe of HQQ: one step, each layer from its weights alone."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.half_quadratic import half_quadratic_round
from hf_lowbit_hqq.config import HQQConfig


def make_recipe(config: HQQConfig) -> Recipe:
    """Half-quadratic rounding of asymmetric integers; to nearest where an override asks for something else."""

    def rounding(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        if spec.format != "int" or spec.symmetric:
            return round_to_nearest(weight, spec)
        return half_quadratic_round(
            weight,
            spec,
            iterations=config.iterations,
            p=config.p,
            beta=config.beta,
            kappa=config.kappa,
            search_scale=config.search_scale,
        )

    return Recipe(rounding=rounding)
