"""The recipe of round to nearest: one step."""

from __future__ import annotations

from hf_lowbit.config import LowbitConfig
from hf_lowbit.method import Recipe
from hf_lowbit.rounding import round_to_nearest


def make_recipe(config: LowbitConfig) -> Recipe:
    """Every layer is rounded on its own, from its weights alone."""
    return Recipe(rounding=round_to_nearest)
