"""The recipe of QLoRA: one step, the nearest values of the table."""

from __future__ import annotations

from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_qlora.config import QLoRAConfig


def make_recipe(config: QLoRAConfig) -> Recipe:
    """Every layer is rounded on its own, from its weights alone."""
    return Recipe(rounding=round_to_nearest)
