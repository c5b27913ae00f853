"""Plan: which module becomes which packed kind with which specification, as a config stores it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_lowbit.formats import SpecError
from hf_lowbit.nn import KINDS, LayerSpec, PackedMixer
from hf_lowbit.plan.patterns import expand, generalisations
from hf_lowbit.suggestion import unknown


class PlanError(ValueError):
    """A plan that does not fit the model, or cannot be read."""


@dataclass(frozen=True)
class PlannedLayer:
    """A registered kind of packed module and what it is built from."""

    kind: str
    spec: LayerSpec

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(unknown("kind of packed module", self.kind, KINDS, "registered"))
        if self.spec.transform is not None and not KINDS[self.kind].takes_transform:
            raise PlanError(f"layers of kind {self.kind!r} cannot have a transform ({self.spec.transform.kind})")
        if self.spec.exact is not None and not KINDS[self.kind].takes_exact:
            raise PlanError(f"layers of kind {self.kind!r} cannot have an exact part ({self.spec.exact.kind})")
        if self.spec.constant_token and not KINDS[self.kind].takes_constant_token:
            raise PlanError(f"layers of kind {self.kind!r} cannot have a constant token")
        if issubclass(KINDS[self.kind], PackedMixer) != (self.spec.mixer is not None):
            raise PlanError(
                f"mixers have a specification 'mixer' and other kinds have none; {self.kind!r} is otherwise"
            )


@dataclass
class Plan:
    """The resolved layers of one model.

    Attributes:
        layers: module name -> planned layer.
        skipped: module name -> why it stays in full precision. Not stored in configs; reports list it.
        warnings: changes a user did not ask for, such as a smaller group. Not stored either.
        others: names of all other modules of the model, for which no stored pattern may stand.
    """

    layers: dict[str, PlannedLayer]
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    others: frozenset[str] = frozenset()

    def to_list(self) -> list[dict[str, Any]]:
        """One entry per distinct layer: ``{"kind", "weight", ..., "modules": [patterns]}``.

        Indices are generalised to ``*`` where every module of that shape of name has the same entry.
        """
        answering: dict[str, set[PlannedLayer | None]] = {}
        for name in (*self.layers, *self.skipped, *self.others):
            for pattern in generalisations(name):
                answering.setdefault(pattern, set()).add(self.layers.get(name))
        entries: dict[PlannedLayer, list[str]] = {}
        for name, layer in self.layers.items():
            candidates = (*generalisations(name), name)
            pattern = next(pattern for pattern in candidates if answering.get(pattern, {layer}) == {layer})
            patterns = entries.setdefault(layer, [])
            if pattern not in patterns:
                patterns.append(pattern)
        return [{"kind": layer.kind, **layer.spec.to_dict(), "modules": modules} for layer, modules in entries.items()]

    @classmethod
    def from_list(cls, entries: list[dict[str, Any]], names: Iterable[str], prefix: str = "") -> Plan:
        """Resolve stored entries against a model's module names.

        Args:
            entries: what :meth:`to_list` wrote.
            names: all module names of the model.
            prefix: the model's base prefix ("model"): a headless model's names lack it, a model with a head has it.

        Raises:
            PlanError: an entry that cannot be read, or a pattern that no module answers to.
        """
        names = list(names)
        layers: dict[str, PlannedLayer] = {}
        for entry in entries:
            layer, patterns = _read_entry(entry)
            for pattern in patterns:
                found = expand(pattern, names) or expand(pattern.removeprefix(f"{prefix}."), names)
                found = found or expand(f"{prefix}.{pattern}", names)
                if not found and not (prefix and pattern.split(".")[0] != prefix):
                    raise PlanError(f"the plan names {pattern!r}, which this model does not have")
                layers.update(dict.fromkeys(found, layer))
        if entries and not layers:
            raise PlanError("no module of the plan is in this model; was the checkpoint made for another architecture?")
        return cls(layers)


def check_entries(entries: Any) -> None:
    """Raise PlanError unless stored entries can be read (module names are checked later, against the model)."""
    if not isinstance(entries, list):
        raise PlanError(f"a plan is a list of layers, not {type(entries).__name__}")
    for entry in entries:
        _read_entry(entry)


def _read_entry(entry: Any) -> tuple[PlannedLayer, list[str]]:
    if not isinstance(entry, dict):
        raise PlanError(f"a layer of a plan is an object, not {entry!r}")
    values = dict(entry)
    kind, modules = values.pop("kind", None), values.pop("modules", None)
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise PlanError(f"a layer of a plan lists its modules by name, not {modules!r}")
    try:
        layer = PlannedLayer(str(kind), LayerSpec.from_dict(values))
        if layer.spec.weight.is_open:
            raise SpecError("its number format lacks a parameter that the method should have found")
        return layer, modules
    except (SpecError, TypeError) as error:
        raise PlanError(f"the plan's entry for {', '.join(modules)} cannot be read: {error}") from None
