"""State-space mixers in a plan: for methods that pack them whole, and nothing around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import KINDS, LayerSpec, MixerSpec, mixer_kind, mixer_refusal
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.plan.plan import PlanError, PlannedLayer

# Of A_log and D, whatever the projections have: so few numbers gain nothing from fewer bits.
WEIGHTS = WeightSpec(bits=8, group_size="tensor", scale_dtype="float32")


class MixerConfig(Protocol):
    """What planning mixers reads of a config."""

    quant_method: ClassVar[Any]
    packs_mixers: ClassVar[bool]
    modules_to_not_convert: list[str] | None

    def mixer_spec(self, name: str, kind: str) -> MixerSpec:
        """How the mixer of this name computes, of the kind "mamba" or "mamba2"."""


@dataclass(frozen=True)
class Mixers:
    """Those of a model.

    Attributes:
        method: the name of who packs them.
        layers: name -> planned mixer.
        skipped: name -> why it stays as it is.
    """

    method: str
    layers: Mapping[str, PlannedLayer]
    skipped: Mapping[str, str]

    def reason_to_skip(self, name: str, is_end: bool) -> str | None:
        """Why a layer is left alone that is not part of a planned mixer; None for the others, and for the ends."""
        if within(name, self.layers):
            return None
        if owner := within(name, self.skipped):
            return f"part of {owner}, which stays in full precision"
        return None if is_end else f"not part of a state-space mixer: {self.method} leaves it to another method"


def within(name: str, modules: Iterable[str]) -> str | None:
    """Which of these modules one is in, if any."""
    return next((module for module in modules if name.startswith(f"{module}.")), None)


def find_mixers(model: nn.Module, config: MixerConfig) -> Mixers | None:
    """The mixers of a model; None for a method that leaves them as they are.

    Raises:
        PlanError: none that can be packed, one that is not supported, or one that the config does not fit.
    """
    if not config.packs_mixers:
        return None
    method = str(config.quant_method).removeprefix("lowbit_")
    layers: dict[str, PlannedLayer] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        kind, refusal = mixer_kind(module), mixer_refusal(module)
        if kind is None and refusal is None:
            continue
        if pattern := first_match(config.modules_to_not_convert or (), name):
            skipped[name] = f"modules_to_not_convert names {pattern!r}"
            continue
        if kind is None:
            raise PlanError(f"{name or 'the model'}: {refusal}; modules_to_not_convert leaves it as it is")
        layers[name] = PlannedLayer(kind, LayerSpec(WEIGHTS, mixer=config.mixer_spec(name, kind)))
        try:
            KINDS[kind].from_float(module, layers[name].spec)
        except ValueError as error:
            raise PlanError(f"{name}: {error}") from None
    if not layers:
        why = f" ({'; '.join(f'{name}: {reason}' for name, reason in skipped.items())})" if skipped else ""
        raise PlanError(
            f"{method} quantizes state-space mixers, and this {type(model).__name__} has none to quantize{why}"
        )
    return Mixers(method, layers, skipped)
