"""The recipe of IR-QLoRA: one step, each group's shift from its weights alone."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.entropy import fit_entropy
from hf_lowbit.rounding.store import round_with, stack
from hf_lowbit_ir_qlora.config import IRQLoRAConfig


def make_recipe(config: IRQLoRAConfig) -> Recipe:
    """Information calibration where there are zero points; to nearest where an override leaves none."""
    fit = partial(fit_entropy, tau_range=config.tau_range, steps=config.tau_steps)

    def rounding(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        if spec.symmetric or spec.has_fitted_table:
            return round_to_nearest(weight, spec)
        if weight.dim() == 3:
            return stack([round_with(fit, matrix, spec) for matrix in weight])
        return round_with(fit, weight, spec)

    return Recipe(rounding=rounding)
