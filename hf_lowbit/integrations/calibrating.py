"""Calibrated methods in from_pretrained: refused without data before any weight is read, run once it is loaded."""

from __future__ import annotations

from torch import nn

from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations.registration import registered_engine
from hf_lowbit.method import Method, Recipe


def check_has_data(method: Method, config: LowbitConfig, drawn: bool = False) -> None:
    """Raise ConfigError for a config that calibrates without data, or that asks for what its method cannot do.

    Args:
        drawn: the data will come from a pipeline.
    """
    recipe = method.make_recipe(config)
    calibrates, low_rank = recipe.calibrate is not None, config.low_rank
    if config.tuning is not None and not calibrates:
        raise ConfigError(
            f"tuning needs a method that calibrates, which {method.name!r} does not, configured like this"
        )
    if low_rank is not None and low_rank.iterations > 1 and calibrates and not recipe.rounds_each:
        raise ConfigError(
            f"low_rank.iterations={low_rank.iterations} rounds every weight anew, less its low-rank part, which "
            f"{method.name!r} cannot: it chooses codes once, from what a whole block reads. Use iterations=1, or a "
            "method that rounds each matrix by itself, such as 'rtn' or 'hqq'"
        )
    if config.dataset is None and calibrates and not drawn:
        raise ConfigError(
            f"{_what_needs_data(method, config, recipe)} needs calibration data: pass dataset=... in its config "
            "(data=... of hf_lowbit.quantize), or dataset='self' to calibrate on text that the model generates itself; "
            "for a diffusion pipeline prompts=... and steps=... of hf_lowbit.quantize"
        )


def _what_needs_data(method: Method, config: LowbitConfig, recipe: Recipe) -> str:
    if not recipe.rounds_each:
        return f"the method {method.name!r}"
    if config.low_rank is not None and config.low_rank.needs_data:
        part = config.low_rank
        name = "keep" if part.keep == "fused" else "metric" if part.metric != "identity" else "budget_bits"
        return f"low_rank.{name}={getattr(part, name)!r}"
    return "activation_static=True"


def calibrate_loaded(model: nn.Module, config: LowbitConfig, recipe: Recipe) -> None:
    """Calibrate a float model that has just been loaded, in place."""
    registered_engine()(model, config, recipe)
