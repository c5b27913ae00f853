"""search_bits(): mixed precision, the bits of every layer that lose least within a budget of bits per weight.

Each group of layers is measured alone at each candidate, losses add up, and an integer program chooses (HAWQ-V3, arXiv
2011.10680; MixDQ, arXiv 2405.17873). What is found is a config: its overrides give the bits, and any weight method
quantizes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_lowbit.allocation import GroupSize, Option, allocate, budget_bits, select_exactly, stored_sizes
from hf_lowbit.calibration.data import CalibrationData, prepare_data
from hf_lowbit.calibration.divergence import group_divergences
from hf_lowbit.calibration.fusing import fused_groups, merged, tied_groups
from hf_lowbit.calibration.sensitivity import Sensitivity, block_losses, measure_layers, output_losses
from hf_lowbit.calibration.store import default_limit
from hf_lowbit.calibration.substitution import Rounding
from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations.loading import model_facts, processing_of
from hf_lowbit.method import method_of
from hf_lowbit.plan import PlannedLayer, build_plan
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.state import shared_weights, state_of

logger = logging.getLogger("hf_lowbit")

METRICS = {
    "hessian": "second-order loss of each layer, weighed by what it does to its block's output",
    "output": "mean squared error of each layer's output",
    "kl": "KL divergence of the model's predictions with one group rounded",
}


@dataclass(frozen=True)
class GroupChoice:
    """Layers that share their bits.

    Attributes:
        layers: their names.
        bits: what was chosen.
        fixed: whether the config's own overrides left no choice.
        elements: weights in them.
        stored_bits: codes, scales, zero points, tables and low-rank factors.
        loss: at these bits.
        losses: bits -> loss, of every candidate.
    """

    layers: tuple[str, ...]
    bits: int
    fixed: bool
    elements: int
    stored_bits: int
    loss: float
    losses: dict[int, float]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: the given one, with the bits as overrides.
        metric: of :data:`METRICS`.
        budget: in bits per weight.
        groups: in the order of the model.
        notes: layer -> why its loss could not be measured on its inputs.
    """

    config: LowbitConfig
    metric: str
    budget: float
    groups: list[GroupChoice]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """What is stored for the quantized layers, over their weights: what a report of the result will say."""
        return sum(group.stored_bits for group in self.groups) / sum(group.elements for group in self.groups)

    @property
    def loss(self) -> float:
        """Sum over groups."""
        return sum(group.loss for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        values = {"metric": self.metric, "budget": self.budget, "bits_per_weight": self.bits_per_weight}
        groups = [asdict(group) for group in self.groups]
        return {**values, "loss": self.loss, "groups": groups, "notes": self.notes, "config": self.config.to_dict()}


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
    fuse: bool = True,
    rounding: str = "nearest",
    kl_samples: int = 4,
) -> SearchResult:
    """Find the bits of every layer. The model is only read.

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
        fuse: layers that kernels run as one share bits (:func:`hf_lowbit.calibration.fusing.fused_groups`).
        rounding: what a candidate's error is measured with: "nearest", or "method": the method's data-free rounding,
            slower where it searches. An exponent that the method searches is always found by the method.
        kl_samples: samples of the metric "kl".

    Returns:
        The choice, and the config with it. Errors of activations and the repair by low-rank factors are not measured.

    Raises:
        AllocationError: a budget that the candidates cannot meet; before the data is read.
        ConfigError: a metric, candidates or a model that cannot be.
        DataError: unusable data.
        SensitivityError: the metric "kl" for a model without logits.
        RoundingError: a weight that cannot be rounded.
    """
    _check(model, metric, candidates, rounding, kl_samples)
    options = _options(model, config, sorted(set(candidates)))
    tied = tied_groups(model, {name: planned[0] for name, planned in options.items()})
    sizes = [stored_sizes(model, group, options) for group in tied]
    elements = sum(size.elements for size in sizes)
    budget = budget_bits(bits_per_weight, [size.bits for size in sizes], elements)
    recipe_rounding = method_of(config).make_recipe(config).rounding
    chosen_rounding = recipe_rounding if rounding == "method" or _is_open(options) else round_to_nearest
    was_training = model.training
    model.eval()
    try:
        calibration = _prepare(model, config, data, kl_samples if metric == "kl" else None)
        groups = tied
        if fuse:
            fused = fused_groups(model, {name: planned[0] for name, planned in options.items()}, calibration.batches[0])
            groups = merged(tied, [part for group in fused for part in _alike(group, options)])
        losses, notes = _measure(model, groups, options, calibration, metric, chosen_rounding)
    finally:
        model.train(was_training)
    sizes = [stored_sizes(model, group, options) for group in groups]
    priced = zip(sizes, losses, strict=True)
    picks = allocate([[Option(*option) for option in zip(size.bits, own, strict=True)] for size, own in priced], budget)
    found = [
        _choice(group, options, size, own, pick)
        for group, size, own, pick in zip(groups, sizes, losses, picks, strict=True)
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
        raise ConfigError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
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


def _options(model: nn.Module, config: LowbitConfig, candidates: Sequence[int]) -> dict[str, list[PlannedLayer]]:
    """Layer -> what it becomes at each candidate, or the one thing that it becomes at all of them."""
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


def _is_open(options: Mapping[str, Sequence[PlannedLayer]]) -> bool:
    return any(layer.spec.weight.is_open for planned in options.values() for layer in planned)


def _alike(group: Sequence[str], options: Mapping[str, Sequence[PlannedLayer]]) -> list[list[str]]:
    """A group's parts whose layers have the same bits to choose from."""
    parts: dict[tuple[int, ...], list[str]] = {}
    for name in group:
        parts.setdefault(tuple(layer.spec.weight.bits for layer in options[name]), []).append(name)
    return [
        part for bits, names in parts.items() for part in ([names] if len(bits) > 1 else [[name] for name in names])
    ]


def _prepare(model: nn.Module, config: LowbitConfig, data: Any, most: int | None) -> CalibrationData:
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
    groups: Sequence[Sequence[str]],
    options: Mapping[str, Sequence[PlannedLayer]],
    data: CalibrationData,
    metric: str,
    rounding: Rounding,
) -> tuple[list[list[float]], dict[str, str]]:
    """The losses of every group at each candidate, and what could not be measured."""
    if metric == "kl":
        return group_divergences(model, groups, options, data.batches, rounding), {}
    measure: Callable[..., Any] = block_losses if metric == "hessian" else output_losses
    found: Sensitivity = measure_layers(model, options, data.batches, measure, rounding, default_limit())
    for name, why in found.notes.items():
        logger.warning("%s: %s; the error of its weights counts instead", name, why)
    return [
        [sum(of) for of in zip(*(found.losses[name] for name in group), strict=True)] for group in groups
    ], found.notes


def _choice(
    group: Sequence[str],
    options: Mapping[str, Sequence[PlannedLayer]],
    size: GroupSize,
    losses: list[float],
    pick: int,
) -> GroupChoice:
    bits = [layer.spec.weight.bits for layer in options[group[0]]]
    return GroupChoice(
        tuple(group),
        bits[pick],
        len(bits) == 1,
        size.elements,
        size.bits[pick],
        losses[pick],
        dict(zip(bits, losses, strict=True)),
    )


def _with_overrides(config: LowbitConfig, groups: Sequence[GroupChoice], names: Sequence[str]) -> LowbitConfig:
    """The config with the bits of every group, before its own overrides, whose other fields they keep."""
    given = config.overrides or {}
    chosen: dict[str, dict[str, Any]] = {}
    for group in groups:
        for name in group.layers if not group.fixed else ():
            pattern = first_match(given, name)
            chosen[name] = {**(given[pattern] if pattern else {}), "bits": group.bits}
    return replace(config, overrides={**select_exactly(chosen, names), **given}, plan=None)
