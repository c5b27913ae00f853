"""Methods: what a plugin declares, and how plugins are found."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.suggestion import unknown

if TYPE_CHECKING:
    from hf_lowbit.calibration.block import Block
    from hf_lowbit.calibration.fitting import FitInputs

ENTRY_POINT_GROUP = "hf_lowbit.methods"
Refine = Callable[[nn.Module, nn.Module, Sequence[dict[str, Any]]], list[str]]
DOMAINS = ("language", "speech", "diffusion", "state-space", "vision")


def _round_to_nearest(weight: Tensor, spec: WeightSpec) -> PackedTensor:
    from hf_lowbit.rounding import round_to_nearest  # registering methods imports no algorithm

    return round_to_nearest(weight, spec)


@dataclass(frozen=True)
class Recipe:
    """The steps of one method. A tensor-wise data-free method is its rounding alone.

    Attributes:
        rounding: weight ``[..., rows, columns]`` and spec -> packed tensor; its ``spec`` is the given one, or completes
            it. A calibrated method's is used where there is nothing to calibrate on (merging an adapter).
        calibrate: what a calibrated method does with each block, in the order of the model.
        targets: whether it needs what the float model's blocks return (:meth:`Block.target`).
        mixed_precision: products in blocks are bfloat16 while these are calibrated, where that is faster than float32;
            statistics and rounding stay float32.
        prepare: rewrites the whole float model first, in place and exactly: model, batches of its arguments -> lines
            for the report. Parameters get new values as new ``data``, so that a failure can be undone; it may untie.
        rounds_each: ``calibrate`` is a data-free method's ``rounding`` of every matrix: the platform sets it where
            something else, a low-rank part, needs the data.
        fit_inputs: finds the stored scales of a layer's inputs: their histogram, their specification -> the
            specification completed, scale and shift. None: the range that ``config.activation_percentile`` asks for.
        refine: trains what is quantized as a whole, after the last block: a float copy of the model as it was before
            the walk, the quantized model, batches of their arguments -> lines for the report. The float copy costs the
            model's memory once more, only where this is set.
    """

    rounding: Callable[[Tensor, WeightSpec], PackedTensor] = _round_to_nearest
    calibrate: Callable[[Block], None] | None = None
    targets: bool = False
    mixed_precision: bool = False
    prepare: Callable[[nn.Module, Sequence[dict[str, Any]]], list[str]] | None = None
    rounds_each: bool = False
    fit_inputs: FitInputs | None = None
    refine: Refine | None = None


@dataclass(frozen=True)
class Method:
    """One plugin.

    Attributes:
        name: unique, lower case; ``quant_method`` on disk is ``lowbit_<name>``.
        config_class: its :class:`LowbitConfig`.
        recipe: "module:attribute" of a function config -> :class:`Recipe`, imported when it is first needed.
        summary: one line for tables.
        paper: where the method comes from.
        domains: of :data:`DOMAINS`.
        needs_data: whether it calibrates.
    """

    name: str
    config_class: type[LowbitConfig]
    recipe: str
    summary: str
    paper: str
    domains: tuple[str, ...] = DOMAINS
    needs_data: bool = False

    def __post_init__(self) -> None:
        if self.config_class.quant_method != f"lowbit_{self.name}":
            raise ValueError(
                f"{self.config_class.__name__}.quant_method must be MethodName('lowbit_{self.name}'), "
                f"not {self.config_class.quant_method!r}"
            )

    def make_recipe(self, config: LowbitConfig) -> Recipe:
        """Import the method's algorithm and build its recipe for a config.

        That of a data-free method calibrates where the config's low-rank part, or scales of inputs, depend on data;
        with a low-rank part that is fused, blocks are corrected before the method sees them.
        """
        module, _, attribute = self.recipe.partition(":")
        recipe: Recipe = getattr(importlib.import_module(module), attribute)(config)
        reads_inputs = config.low_rank is not None and config.low_rank.needs_data
        if recipe.calibrate is None and (reads_inputs or config.has_static_inputs):
            from hf_lowbit.calibration.low_rank import round_each

            recipe = replace(recipe, calibrate=round_each(recipe.rounding), rounds_each=True)
        if config.low_rank is not None and config.low_rank.keep == "fused" and recipe.calibrate is not None:
            from hf_lowbit.calibration.correction import corrected_first

            recipe = replace(recipe, calibrate=corrected_first(recipe.calibrate, config.low_rank_of), targets=True)
        return recipe


@cache
def methods() -> dict[str, Method]:
    """Every installed method by name, found through the entry points of the group ``hf_lowbit.methods``.

    A plugin that fails to import is left out with a warning; a name taken twice raises ValueError.
    """
    found: dict[str, Method] = {}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        try:
            method = entry.load()
        except Exception as error:  # a broken plugin must not break the others
            warnings.warn(
                f"hf_lowbit: the method plugin {entry.name!r} ({entry.value}) failed to load: {error!r}", stacklevel=2
            )
            continue
        if not isinstance(method, Method):
            warnings.warn(f"hf_lowbit: the entry point {entry.name!r} ({entry.value}) is not a Method", stacklevel=2)
            continue
        if found.setdefault(method.name, method) != method:
            raise ValueError(f"two plugins provide the method {method.name!r}: {found[method.name]} and {method}")
    return found


def config_of(config: LowbitConfig | str) -> LowbitConfig:
    """A config as it is, or the default one of the method of this name.

    Raises:
        ConfigError: an unknown method, or neither.
    """
    if isinstance(config, LowbitConfig):
        return config
    if not isinstance(config, str):
        raise ConfigError(f"config must be a method's config or its name, not {type(config).__name__}")
    return method_named(config).config_class()  # type: ignore[call-arg]  # quant_method is a class attribute here


def method_named(name: str) -> Method:
    """The installed method of this name. Raises ConfigError for any other name, naming the closest."""
    if name not in methods():
        raise ConfigError(unknown("method", name, methods(), "installed"))
    return methods()[name]


def method_of(config: LowbitConfig) -> Method:
    """The method a config belongs to. Raises ValueError if its plugin is not installed."""
    name = str(config.quant_method).removeprefix("lowbit_")
    if name not in methods():
        raise ValueError(f"the method {name!r} is not installed; installed: {', '.join(methods())}")
    return methods()[name]
