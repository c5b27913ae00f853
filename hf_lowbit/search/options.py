"""What every layer may become: the candidates that a search chooses from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from hf_lowbit.config import ConfigError, LowbitConfig, LowRankConfig
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.nn import KINDS
from hf_lowbit.plan import PlannedLayer, build_plan
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.state import shared_weights

logger = logging.getLogger("hf_lowbit")

Options = Mapping[str, Sequence[PlannedLayer]]


def options_of(model: nn.Module, config: LowbitConfig, candidates: Sequence[int]) -> dict[str, list[PlannedLayer]]:
    """Layer -> what it becomes at each candidate of bits, or the one thing that it becomes at all of them."""
    facts = model_facts(model, shared_weights(model))
    plans = []
    for bits in candidates:
        try:
            plans.append(build_plan(model, replace(config, bits=bits, plan=None), facts))
        except ConfigError as problem:
            raise ConfigError(f"the candidate of {bits} bits cannot be: {problem}") from None
    for warning in plans[0].warnings:
        logger.warning(warning)
    if differing := set.union(*(set(plan.layers) ^ set(plans[0].layers) for plan in plans)):
        raise ConfigError(
            f"{min(differing)} is quantized at some candidates only: layers that share a weight need the same overrides"
        )
    each = {name: [plan.layers[name] for plan in plans] for name in plans[0].layers}
    return {name: planned if len(set(planned)) > 1 else planned[:1] for name, planned in each.items()}


def options_with_ranks(
    model: nn.Module, config: LowbitConfig, candidates: Sequence[int], ranks: Sequence[int]
) -> tuple[LowbitConfig, dict[str, list[PlannedLayer]]]:
    """Layer -> what it becomes at each candidate of bits with each rank of its branch, the lowest rank of each first.

    Ranks above a layer's smaller side are left out. A layer whose rank the config's overrides give keeps it.

    Returns:
        The config, with a low-rank part of the metric "full" if it had none, and the options.

    Raises:
        ConfigError: ranks that cannot be, or factors that are stored nowhere.
    """
    if not ranks or any(type(rank) is not int or rank < 0 for rank in ranks):
        raise ConfigError(f"ranks must be a list of integers of at least 0 such as (0, 8, 16, 32), not {ranks!r}")
    part = config.low_rank or LowRankConfig(max(1, *ranks), metric="full")
    if part.keep == "fused":
        raise ConfigError('low_rank keep="fused" stores no factors: there are no ranks to choose within a budget')
    least = replace(config, low_rank=replace(part, rank=1, budget_bits=None), plan=None)
    options: dict[str, list[PlannedLayer]] = {}
    for name, planned in options_of(model, least, candidates).items():
        own = [config.low_rank_of(name)] if gives_rank(config, name) else sorted(set(ranks))
        side = _smaller_side(model.get_submodule(name), planned[0])
        fitting = [rank for rank in own if rank <= side] or [side]
        options[name] = [
            replace(layer, spec=replace(layer.spec, low_rank=rank, factor_bits=part.factor_bits))
            for layer in planned
            for rank in fitting
        ]
    return replace(config, low_rank=part, plan=None), options


def gives_rank(config: LowbitConfig, name: str) -> bool:
    """Whether an override decides a layer's rank."""
    pattern = first_match(config.overrides or (), name)
    return bool(config.overrides and pattern and "low_rank" in config.overrides[pattern])


def widths(planned: Sequence[PlannedLayer]) -> tuple[int, ...]:
    """The bits among a layer's candidates."""
    return tuple(dict.fromkeys(layer.spec.weight.bits for layer in planned))


def alike(group: Sequence[str], options: Options) -> list[list[str]]:
    """A group's parts whose layers have the same bits to choose from."""
    parts: dict[tuple[int, ...], list[str]] = {}
    for name in group:
        parts.setdefault(widths(options[name]), []).append(name)
    return [
        part for bits, names in parts.items() for part in ([names] if len(bits) > 1 else [[name] for name in names])
    ]


def _smaller_side(module: nn.Module, layer: PlannedLayer) -> int:
    """The largest rank that every matrix of a layer can have."""
    skeleton = KINDS[layer.kind].from_float(module, layer.spec)
    sides = []
    for parameter in skeleton.packed_parameters:
        leading, columns = skeleton.matrix_shape(parameter)
        sides.append(min(leading[-1] // skeleton.branches(parameter), columns))
    return min(sides)
