"""Calibrated methods in from_pretrained: refused without data before any weight is read, run once it is loaded."""

from __future__ import annotations

from torch import nn

from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations.registration import registered_engine
from hf_lowbit.method import Method, Recipe


def check_has_data(method: Method, config: LowbitConfig) -> None:
    """Raise ConfigError for a config that has its method calibrate, and no data; or tunes what does not calibrate."""
    calibrates = method.make_recipe(config).calibrate is not None
    if config.tuning is not None and not calibrates:
        raise ConfigError(
            f"tuning needs a method that calibrates, which {method.name!r} does not, configured like this"
        )
    if config.dataset is None and calibrates:
        raise ConfigError(
            f"the method {method.name!r} needs calibration data: pass dataset=... in its config (data=... of "
            "hf_lowbit.quantize), or dataset='self' to calibrate on text that the model generates itself"
        )


def calibrate_loaded(model: nn.Module, config: LowbitConfig, recipe: Recipe) -> None:
    """Calibrate a float model that has just been loaded, in place."""
    registered_engine()(model, config, recipe)
