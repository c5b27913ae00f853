"""From a config and an empty model to a plan: every module with weights is either planned or skipped for a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import KINDS, LayerSpec, PackedLinear, PackedModule, answer_owner, kind_of, refusal_of
from hf_lowbit.plan.adapters import check_adapters
from hf_lowbit.plan.groups import fit_inputs, fitting_group, misfit, widths_of
from hf_lowbit.plan.mixers import MixerConfig, Mixers, find_mixers, within
from hf_lowbit.plan.patterns import first_match, generalise
from hf_lowbit.plan.plan import Plan, PlanError, PlannedLayer
from hf_lowbit.plan.readers import directly_read, type_read


class Compensation(Protocol):
    """What planning reads of a low-rank compensation."""

    @property
    def keep(self) -> str:
        """Where it is kept."""

    @property
    def budget_bits(self) -> float | None:
        """A number where ranks are still to be chosen."""


class PlanningConfig(MixerConfig, Protocol):
    """What planning reads of a config."""

    overrides: dict[str, dict[str, object]] | None
    strict_groups: bool
    fits_rank: ClassVar[bool]
    quantize_embeddings: bool
    quantize_lm_head: bool

    @property
    def low_rank(self) -> Compensation | None:
        """Compensation of the rounding error, or None."""

    def layer_spec(self, name: str) -> LayerSpec:
        """The specification of a module after overrides."""

    def low_rank_of(self, name: str) -> int:
        """The rank of a module's compensation, wherever it is kept."""


@dataclass(frozen=True)
class ModelFacts:
    """What an integration knows of a model that its modules do not say.

    Attributes:
        output_heads: names of output embeddings and classification heads.
        tied: sets of module names that share one weight.
        full_precision: patterns of modules that the library keeps in float32.
    """

    output_heads: frozenset[str] = frozenset()
    tied: tuple[frozenset[str], ...] = ()
    full_precision: tuple[str, ...] = ()

    def tied_to(self, name: str) -> frozenset[str]:
        """The other modules that share the weight of ``name``."""
        return next((group - {name} for group in self.tied if name in group), frozenset())


def build_plan(model: nn.Module, config: PlanningConfig, facts: ModelFacts = ModelFacts()) -> Plan:
    """Plan a model, without reading any weight.

    Raises:
        PlanError: a group that does not divide a layer's input under ``strict_groups``, a compensation adapter for
            layers that PEFT cannot adapt, nothing to quantize, or no state-space mixers for a method that packs these.
    """
    mixers = find_mixers(model, config)
    plan = Plan({}) if mixers is None else Plan(dict(mixers.layers), dict(mixers.skipped))
    regrouped: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name in plan.layers or name in plan.skipped:
            continue  # a mixer
        kind = kind_of(module)
        reason = refusal_of(module) or _reason_to_skip(model, name, module, kind, config, facts, mixers)
        if reason is not None:
            plan.skipped[name] = reason
        elif kind is not None:
            spec = _fit_groups(name, module, kind, config, regrouped)
            is_table = any(_is_embedding(model, other) for other in (name, *facts.tied_to(name)))
            widths = widths_of(KINDS[kind].from_float(module, spec))
            spec = fit_inputs(name, spec, widths, is_table, config.strict_groups, regrouped)
            if kind == "conv1d" and within(name, () if mixers is None else mixers.layers):
                spec = replace(spec, activation=None)  # the mixer has its inputs quantized
            plan.layers[name] = PlannedLayer(kind, spec)
    plan.others = frozenset(name for name, _ in model.named_modules()) - {*plan.layers, *plan.skipped}
    plan.warnings += [f"{text}: {_summary(names)}" for text, names in regrouped.items()]
    _skip_partly_tied(plan, facts)
    if config.low_rank is not None and config.low_rank.keep == "adapter":
        check_adapters(model, {name: layer for name, layer in plan.layers.items() if config.low_rank_of(name)})
    for pattern in (*(config.modules_to_not_convert or ()), *(config.overrides or ())):
        if not any(first_match([pattern], name) for name, _ in model.named_modules()):
            plan.warnings.append(f"the pattern {pattern!r} matches no module of this model")
    if not plan.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:5])
        raise PlanError(f"nothing to quantize in this {type(model).__name__} ({reasons or 'no layers with weights'})")
    return plan


def install(model: nn.Module, plan: Plan, packed: bool) -> None:
    """Replace the planned modules by packed ones, in place.

    Args:
        packed: True: with empty codes of the stored shapes, ready for a quantized checkpoint; False: with the float
            parameters still in place, ready to be quantized.

    Raises:
        PlanError: a stored plan that takes a module for something it is not.
    """
    replacements = {}
    for name, layer in plan.layers.items():
        original = model.get_submodule(name)
        if kind_of(original) not in (layer.kind, None):
            actual = type(original).__name__
            raise PlanError(f"the plan calls {name} a {layer.kind}, but in this model it is a {actual}")
        try:
            module = KINDS[layer.kind].from_float(original, layer.spec)
            for parameter in module.packed_parameters:
                module.allocate(parameter, packed)
        except (TypeError, ValueError) as error:
            raise PlanError(f"the plan's entry for {name} does not fit this model: {error}") from None
        module.train(model.training)
        replacements[name] = module
    replace_modules(model, replacements)


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put modules in the places of those called by these names: in every place, where a module is used in several.

    Owners that read the type of a packed layer's weight are told that of the layer it replaces.

    Raises:
        PlanError: one of them is the model itself.
    """
    if "" in replacements:
        raise PlanError("the model itself is a single layer; wrap it in a module")
    by_original = {id(model.get_submodule(name)): module for name, module in replacements.items()}
    places = [(owner, key, id(child)) for owner in model.modules() for key, child in owner._modules.items()]
    for owner, key, original in places:
        if original in by_original:
            replaced, module = owner._modules[key], by_original[original]
            setattr(owner, key, module)
            if isinstance(module, PackedLinear) and type_read(owner, key):
                answer_owner(owner, key, _float_type(replaced))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """:func:`replace_modules` for a single one."""
    replace_modules(model, {name: module})


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Name -> module of every packed module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def _reason_to_skip(
    model: nn.Module,
    name: str,
    module: nn.Module,
    kind: str | None,
    config: PlanningConfig,
    facts: ModelFacts,
    mixers: Mixers | None,
) -> str | None:
    if kind is None:
        return None
    if not name:
        return "the model itself is a single layer"
    if pattern := first_match(config.modules_to_not_convert or (), name):
        return f"modules_to_not_convert names {pattern!r}"
    if pattern := first_match(facts.full_precision, name):
        return f"the model keeps {pattern!r} in float32"
    tied = facts.tied_to(name)
    ends = {other for other in (name, *tied) if other in facts.output_heads or _is_embedding(model, other)}
    if ends and tied and not (config.quantize_embeddings or config.quantize_lm_head):
        return f"tied to {', '.join(sorted(tied))}; quantize_embeddings=True packs both"
    if ends and not tied and kind == "embedding" and not config.quantize_embeddings:
        return "an embedding; quantize_embeddings=True packs it"
    if ends and not tied and kind != "embedding" and not config.quantize_lm_head:
        return "the output head; quantize_lm_head=True packs it"
    if mixers is not None and (reason := mixers.reason_to_skip(name, bool(ends))):
        return reason
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    is_read = directly_read(owner, child) or (kind != "linear" and type_read(owner, child))
    if (mixers is None or parent not in mixers.layers) and is_read:
        return f"{type(owner).__name__} reads {child}.weight itself"
    if kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return "an embedding with max_norm rewrites its weights"
    if _columns(module, kind) < 2:
        return "one input per output: there is nothing to pack"
    return None


def _float_type(replaced: nn.Module | None) -> torch.dtype:
    weight = getattr(replaced, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return torch.get_default_dtype()


def _is_embedding(model: nn.Module, name: str) -> bool:
    return kind_of(model.get_submodule(name)) == "embedding"


def _columns(module: nn.Module, kind: str) -> int:
    """Smallest row width of the module's packed parameters."""
    return min(widths_of(KINDS[kind].from_float(module, LayerSpec(WeightSpec()))))


def _fit_groups(
    name: str, module: nn.Module, kind: str, config: PlanningConfig, regrouped: dict[str, list[str]]
) -> LayerSpec:
    """The layer's spec, with the largest group that divides every row of its parameters."""
    spec = config.layer_spec(name)
    group = spec.weight.group_size
    if not isinstance(group, int):
        return _checked(name, module, kind, config, spec, regrouped)
    skeleton = KINDS[kind].from_float(module, spec)
    if spec.weight.scale_bits is not None and (reason := _why_plain_scales(skeleton)):
        regrouped.setdefault(reason, []).append(name)
        spec = replace(spec, weight=_with_plain_scales(spec.weight))
    widths = widths_of(skeleton)
    chosen = fitting_group(widths, group)
    if chosen == group:
        return _checked(name, module, kind, config, spec, regrouped)
    problem = misfit("group_size", group, widths)
    if config.strict_groups:
        hint = f"a group_size of {chosen}" if chosen else "group_size=None"
        raise PlanError(f"{name}: {problem}; use {hint} for it (overrides), or strict_groups=False")
    instead = "one scale per row" if chosen is None else f"groups of {chosen}"
    regrouped.setdefault(f"{problem}, {instead} instead", []).append(name)
    weight = spec.weight if chosen is not None else _with_plain_scales(spec.weight)
    return _checked(name, module, kind, config, replace(spec, weight=replace(weight, group_size=chosen)), regrouped)


def _with_plain_scales(weight: WeightSpec) -> WeightSpec:
    return replace(weight, scale_bits=None, scale_group=16)


def _why_plain_scales(skeleton: PackedModule) -> str | None:
    """Why scales must not be codes: experts are split when they are saved, into parts of whole groups of rows."""
    size = skeleton.layer_spec.weight.scale_group
    for parameter in skeleton.packed_parameters if skeleton.kind == "experts" else ():
        rows = skeleton.matrix_shape(parameter)[0][-1] // skeleton.branches(parameter)
        if rows % size:
            return f"scale_group={size} does not divide the {rows} rows of an expert's projection, plain scales instead"
    return None


def _checked(
    name: str,
    module: nn.Module,
    kind: str,
    config: PlanningConfig,
    spec: LayerSpec,
    regrouped: dict[str, list[str]],
) -> LayerSpec:
    """The spec, if the layer can have it. Raises PlanError naming the layer and what to do."""
    if kind == "experts" and spec.weight.has_fitted_table:
        raise PlanError(
            f"{name}: a codebook cannot be fitted to fused experts; give codebook=[...] or override the format"
        )
    if (rank := config.low_rank_of(name)) and config.low_rank is not None and config.low_rank.budget_bits is None:
        skeleton = KINDS[kind].from_float(module, spec)
        for parameter in skeleton.packed_parameters:
            leading, columns = skeleton.matrix_shape(parameter)
            rows = leading[-1] // skeleton.branches(parameter)
            if rank > min(rows, columns):
                if config.fits_rank:
                    problem = f"low_rank.rank={rank} exceeds the smaller side of a {rows} x {columns} matrix"
                    regrouped.setdefault(f"{problem}, no branch instead", []).append(name)
                    return replace(spec, low_rank=0)
                raise PlanError(
                    f"{name}: low_rank.rank={rank} exceeds the smaller side of its {rows} x {columns} matrix; lower "
                    f"the rank, or give the layer its own: overrides={{{name!r}: {{'low_rank': {min(rows, columns)}}}}}"
                )
    return spec


def _summary(names: list[str]) -> str:
    """Names with their list indices as ``*``, and how many there are."""
    patterns = dict.fromkeys(generalise(name) for name in names)
    return f"{', '.join(patterns)} ({len(names)} layer{'s' if len(names) > 1 else ''})"


def _skip_partly_tied(plan: Plan, facts: ModelFacts) -> None:
    """Modules that share a weight are packed together and alike, or not at all."""
    for group in facts.tied:
        planned = [name for name in group if name in plan.layers]
        missing = [name for name in group if name in plan.skipped]
        differing = len({plan.layers[name].spec for name in planned}) > 1
        for name in planned if missing or differing else ():
            others = ", ".join(sorted(group - {name}))
            why = "is not packed" if missing else "has another specification"
            plan.skipped[name] = f"tied to {others}, which {why}"
            del plan.layers[name]
