"""search_bits(): mixed precision, the bits of every layer that lose least within a budget of bits per weight.

Each group of layers is measured alone at each candidate, losses add up, and an integer program chooses (HAWQ-V3, arXiv
2011.10680; MixDQ, arXiv 2405.17873); with ranks, it spends the same budget on low-rank repair too (LQ-LoRA, arXiv
2311.12023, chooses formats so). What is found is a config: its overrides give bits and ranks, and any weight method
quantizes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_lowbit.allocation import GroupSize, Option, allocate, budget_bits, combined, select_exactly, stored_sizes
from hf_lowbit.calibration.data import CalibrationData, prepare_data
from hf_lowbit.calibration.divergence import group_divergences
from hf_lowbit.calibration.fusing import fused_groups, merged, tied_groups
from hf_lowbit.calibration.sensitivity import Sensitivity, block_losses, measure_layers, output_losses
from hf_lowbit.calibration.store import default_limit
from hf_lowbit.calibration.substitution import Rounding
from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations.loading import processing_of
from hf_lowbit.method import method_of
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.search.options import Options, alike, gives_rank, options_of, options_with_ranks, widths
from hf_lowbit.search.result import GroupChoice, SearchResult
from hf_lowbit.state import state_of
from hf_lowbit.suggestion import unknown

logger = logging.getLogger("hf_lowbit")

METRICS = {
    "hessian": "second-order loss of each layer, weighed by what it does to its block's output",
    "output": "mean squared error of each layer's output",
    "kl": "KL divergence of the model's predictions with one group rounded",
}


def search_bits(
    model: nn.Module,
    config: LowbitConfig,
    data: Any = None,
    bits_per_weight: float = 3.25,
    candidates: Sequence[int] = (2, 3, 4, 8),
    metric: str = "hessian",
    **options: Any,
) -> LowbitConfig:
    """The config of :func:`search`'s result."""
    return search(model, config, data, bits_per_weight, candidates, metric, **options).config


@torch.no_grad()
def search(
    model: nn.Module,
    config: LowbitConfig,
    data: Any = None,
    bits_per_weight: float = 3.25,
    candidates: Sequence[int] = (2, 3, 4, 8),
    metric: str = "hessian",
    *,
    ranks: Sequence[int] | None = None,
    fuse: bool = True,
    rounding: str = "nearest",
    kl_samples: int = 4,
    allows_less: bool = False,
) -> SearchResult:
    """Find the bits of every layer, and the rank of its low-rank branch. The model is only read.

    Args:
        model: float, on one device.
        config: of any method. Layers whose bits its overrides give keep them; ``bits`` itself is not read.
        data: calibration data; None takes ``config.dataset``. ``num_samples``, ``sequence_length`` and ``seed`` of the
            config say how much of it is read.
        bits_per_weight: the most that may be stored for the quantized layers, scales and zero points included.
        candidates: bits to choose from.
        metric: "hessian" (:func:`hf_lowbit.calibration.sensitivity.block_losses`), "output"
            (:func:`hf_lowbit.calibration.sensitivity.output_losses`), or "kl": KL(float || rounded) of the next token,
            with one group rounded (ZeroQ's sensitivity, arXiv 2001.00281): most faithful, and one forward of
            ``kl_samples`` samples for every group and candidate.
        ranks: of low-rank branches, to choose from, 0 for none; those above a layer's smaller side are left out. Bits
            and ranks share the budget. A config without ``low_rank`` gets one of the metric "full"; layers whose rank
            its overrides give keep it. None: the config's own rank, everywhere.
        fuse: layers that kernels run as one share bits (:func:`hf_lowbit.calibration.fusing.fused_groups`); each has a
            rank of its own.
        rounding: what a candidate's error is measured with: "nearest", or "method": the method's data-free rounding,
            slower where it searches. An exponent that the method searches is always found by the method.
        kl_samples: samples of the metric "kl".
        allows_less: a budget above what the largest candidates store is no error.

    Returns:
        The choice, and the config with it. Errors of activations are not measured; nor, by the metric "kl", is the
        repair by low-rank factors.

    Raises:
        AllocationError: a budget that the candidates cannot meet; before the data is read.
        ConfigError: a metric, candidates or a model that cannot be, or a method that packs mixers whole.
        DataError: unusable data.
        SensitivityError: the metric "kl" for a model without logits.
        RoundingError: a weight that cannot be rounded.
    """
    _check(model, metric, candidates, rounding, kl_samples)
    if config.packs_mixers:
        raise ConfigError(
            f"{method_of(config).name} packs state-space mixers whole, and their bits are not searched layer by layer: "
            "search_blocks (--blocks on the command line) finds blocks that are worth better fields, such as 8 bits"
        )
    if metric == "kl" and ranks is not None:
        raise ConfigError("the metric 'kl' does not measure what low-rank factors repair: use 'hessian' for ranks")
    if ranks is None:
        options = options_of(model, config, sorted(set(candidates)))
    else:
        config, options = options_with_ranks(model, config, sorted(set(candidates)), ranks)
    tied = tied_groups(model, {name: planned[0] for name, planned in options.items()})
    sizes = [stored_sizes(model, group, options) for group in tied]
    elements = sum(size.elements for size in sizes)
    budget = budget_bits(bits_per_weight, [size.bits for size in sizes], elements, allows_less)
    recipe_rounding = method_of(config).make_recipe(config).rounding
    chosen_rounding = recipe_rounding if rounding == "method" or _is_open(options) else round_to_nearest
    was_training = model.training
    model.eval()
    try:
        calibration = prepare(model, config, data, kl_samples if metric == "kl" else None)
        groups = tied
        if fuse:
            fused = fused_groups(model, {name: planned[0] for name, planned in options.items()}, calibration.batches[0])
            groups = merged(tied, [part for group in fused for part in alike(group, options)])
        losses, notes = _measure(model, tied, options, groups, calibration, config, metric, chosen_rounding)
    finally:
        model.train(was_training)
    units = {group[0]: _Unit(group, size, own) for group, size, own in zip(tied, sizes, losses, strict=True)}
    joined = [[units[name] for name in group if name in units] for group in groups]
    fronts = [_front(group, options) for group in joined]
    picks = allocate([[choice for choice, _ in front] for front in fronts], budget)
    found = [
        _choice(group, options, front[pick][1], ranks is not None)
        for group, front, pick in zip(joined, fronts, picks, strict=True)
    ]
    order = list(options)
    found.sort(key=lambda choice: order.index(choice.layers[0]))
    result = SearchResult(_with_overrides(config, found, order), metric, bits_per_weight, found, notes)
    logger.info(
        "%.4f bits per weight of at most %g, total loss %.4g", result.bits_per_weight, bits_per_weight, result.loss
    )
    return result


def _check(model: nn.Module, metric: str, candidates: Sequence[int], rounding: str, kl_samples: int) -> None:
    if metric not in METRICS:
        raise ConfigError(unknown("metric", metric, METRICS))
    if rounding not in ("nearest", "method"):
        raise ConfigError(f"rounding must be 'nearest' or 'method', not {rounding!r}")
    if not candidates or any(type(bits) is not int for bits in candidates):
        raise ConfigError(f"candidates must be a list of bits such as (2, 3, 4, 8), not {candidates!r}")
    if type(kl_samples) is not int or kl_samples < 1:
        raise ConfigError(f"kl_samples must be a positive integer, not {kl_samples!r}")
    if state_of(model) is not None:
        raise ConfigError("this model is quantized already: bits are searched on the float model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("part of this model is offloaded or on the meta device; load it whole")


def _is_open(options: Options) -> bool:
    return any(layer.spec.weight.is_open for planned in options.values() for layer in planned)


class _Unit(NamedTuple):
    """Layers that share a weight: most are alone."""

    layers: Sequence[str]
    size: GroupSize
    losses: list[float]


def _front(group: Sequence[_Unit], options: Options) -> list[tuple[Option, tuple[int, ...]]]:
    """What a group can become, with the candidate of each of its units: the same bits, and any ranks."""
    front = []
    for bits in widths(options[group[0].layers[0]]):
        own = [
            [index for index, layer in enumerate(options[unit.layers[0]]) if layer.spec.weight.bits == bits]
            for unit in group
        ]
        choices = [
            [Option(unit.size.bits[index], unit.losses[index]) for index in indices]
            for unit, indices in zip(group, own, strict=True)
        ]
        for total, picks in combined(choices):
            front.append((total, tuple(indices[pick] for indices, pick in zip(own, picks, strict=True))))
    return front


def prepare(model: nn.Module, config: LowbitConfig, data: Any, most: int | None = None) -> CalibrationData:
    """The batches that a search measures on; of ``most`` samples, one to a batch, where that is given."""
    source = config.dataset if data is None else data
    if source is None:
        raise ConfigError(
            "a search needs calibration data: pass data=..., or data='self' for text that the model generates itself"
        )
    samples = config.num_samples if most is None else min(most, config.num_samples)
    prepared = prepare_data(
        source, model, lambda: processing_of(model), num_samples=samples, sequence_length=config.sequence_length,
        seed=config.seed, batch_size=8 if most is None else 1,
    )  # fmt: skip
    logger.info("measuring on %s: %d batches, %d tokens", prepared.description, len(prepared.batches), prepared.tokens)
    return prepared


def _measure(
    model: nn.Module,
    units: Sequence[Sequence[str]],
    options: Options,
    groups: Sequence[Sequence[str]],
    data: CalibrationData,
    config: LowbitConfig,
    metric: str,
    rounding: Rounding,
) -> tuple[list[list[float]], dict[str, str]]:
    """The losses of every unit at each candidate, and what could not be measured."""
    if metric == "kl":
        found_kl = group_divergences(model, groups, options, data.batches, rounding)
        owner = {name: losses for group, losses in zip(groups, found_kl, strict=True) for name in group[:1]}
        return [owner.get(unit[0], [0.0] * len(options[unit[0]])) for unit in units], {}
    measure: Callable[..., Any] = block_losses if metric == "hessian" else output_losses
    low_rank = "identity" if config.low_rank is None else config.low_rank.metric
    found: Sensitivity = measure_layers(model, options, data.batches, measure, rounding, default_limit(), low_rank)
    for name, why in found.notes.items():
        logger.warning("%s: %s; the error of its weights counts instead", name, why)
    return [[sum(of) for of in zip(*(found.losses[name] for name in unit), strict=True)] for unit in units], found.notes


def _choice(
    group: Sequence[_Unit],
    options: Options,
    picks: Sequence[int],
    ranked: bool,
) -> GroupChoice:
    losses: dict[int, float] = {}
    for bits in widths(options[group[0].layers[0]]):
        least = 0.0
        for unit in group:
            least += next(
                loss
                for layer, loss in zip(options[unit.layers[0]], unit.losses, strict=True)
                if layer.spec.weight.bits == bits
            )
        losses[bits] = least
    chosen = {name: options[name][pick].spec for unit, pick in zip(group, picks, strict=True) for name in unit.layers}
    return GroupChoice(
        tuple(chosen),
        next(iter(chosen.values())).weight.bits,
        len(losses) == 1,
        sum(unit.size.elements for unit in group),
        sum(unit.size.bits[pick] for unit, pick in zip(group, picks, strict=True)),
        sum(unit.losses[pick] for unit, pick in zip(group, picks, strict=True)),
        losses,
        {name: spec.low_rank for name, spec in chosen.items()} if ranked else {},
    )


def _with_overrides(config: LowbitConfig, groups: Sequence[GroupChoice], names: Sequence[str]) -> LowbitConfig:
    """The config with bits and ranks of every group, before its own overrides, whose other fields they keep."""
    given = config.overrides or {}
    chosen: dict[str, dict[str, Any]] = {}
    for group in groups:
        for name in group.layers:
            new = {} if group.fixed else {"bits": group.bits}
            if name in group.ranks and not gives_rank(config, name):
                new["low_rank"] = group.ranks[name]
            if new:
                pattern = first_match(given, name)
                chosen[name] = {**(given[pattern] if pattern else {}), **new}
    return replace(config, overrides={**select_exactly(chosen, names), **given}, plan=None)
