"""The layers of a denoiser, with the widths that each of them can have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_lowbit.allocation.coupled_groups import TOLERANCE, ScoredLayer, reachable
from hf_lowbit.allocation.integer_program import AllocationError
from hf_lowbit.config import LowbitConfig
from hf_lowbit.nn import KINDS
from hf_lowbit.plan import PlannedLayer
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.search.options import options_of
from hf_lowbit.search.pipeline.groups import QUALITY, group_layers
from hf_lowbit.search.pipeline.inputs import READS
from hf_lowbit.search.pipeline.settings import Settings

_LEAST_QUALITY = 4  # bits of quality layers' weights: the paper gives them no fewer


@dataclass(frozen=True)
class Subject:
    """One layer.

    Attributes:
        name, group: of the layer.
        weights: bits -> what it becomes; one entry where there is no choice.
        elements: weights in it.
        inputs: bits to choose from for its inputs; one entry where there is no choice, empty for full precision.
        parts: columns of the weight's parts that have scales of their own, if it reads a concatenation.
    """

    name: str
    group: str
    weights: Mapping[int, PlannedLayer]
    elements: int
    inputs: tuple[int, ...] = ()
    parts: tuple[int, ...] | None = None


def subjects_of(
    model: nn.Module,
    config: LowbitConfig,
    settings: Settings,
    text_layers: Sequence[str],
    content: Sequence[str] | None,
    parts: Mapping[str, tuple[int, ...]],
) -> list[Subject]:
    """Every layer that the config quantizes, in the order of the model.

    Args:
        text_layers: layers that read the text.
        content: names or regular expressions of content layers; None: see :func:`group_layers`.
        parts: layer -> channels of the parts of its input that have scales of their own.

    Raises:
        AllocationError: the budget of weights lies outside what the candidates allow.
        ConfigError: candidates that the config's number format does not have.
    """
    options = options_of(model, config, sorted(set(settings.candidates)))
    groups = group_layers(options, text_layers, content)
    found = []
    for name, planned in options.items():
        module = model.get_submodule(name)
        weights = {layer.spec.weight.bits: layer for layer in planned}
        fine = {bits: layer for bits, layer in weights.items() if bits >= _LEAST_QUALITY}
        own = fine if groups[name] == QUALITY and fine else weights
        inputs = _input_widths(config, name, planned[0], settings) if isinstance(module, READS) else ()
        skeleton = KINDS[planned[0].kind].from_float(module, planned[0].spec)
        shapes = [skeleton.matrix_shape(parameter) for parameter in skeleton.packed_parameters]
        elements = sum(math.prod(leading) * columns for leading, columns in shapes)
        found.append(Subject(name, groups[name], own, elements, inputs, _columns(parts.get(name), shapes[0][1])))
    _check_budget(found, settings.bits_per_weight)
    return found


def _columns(channels: tuple[int, ...] | None, columns: int) -> tuple[int, ...] | None:
    if channels is None or columns % sum(channels):  # a convolution of several groups
        return None
    return tuple(width * (columns // sum(channels)) for width in channels)


def _input_widths(config: LowbitConfig, name: str, planned: PlannedLayer, settings: Settings) -> tuple[int, ...]:
    if settings.bits_per_input is None or planned.spec.activation is None:
        return ()
    pattern = first_match(config.overrides or (), name)
    if config.overrides and pattern and "activation_bits" in config.overrides[pattern]:
        return (planned.spec.activation.bits,)
    return tuple(sorted(set(settings.input_candidates)))


def _check_budget(subjects: Sequence[Subject], target: float) -> None:
    """Before hours of measuring."""
    least, most = reachable([ScoredLayer(s.elements, dict.fromkeys(s.weights, 0.0)) for s in subjects])
    if not least <= target + TOLERANCE or target - TOLERANCE > most:
        raise AllocationError(
            f"{target:g} bits per weight cannot be reached: these candidates have means of {least:.4g} to {most:.4g} "
            "bits, scales not counted; change the budget or the candidates"
        )
