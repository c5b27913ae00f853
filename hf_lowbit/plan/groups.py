"""Groups that divide what a layer reads, for weights and inputs by one rule, and which inputs have stored scales."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from hf_lowbit.nn import LayerSpec, PackedModule
from hf_lowbit.plan.plan import PlanError

_SMALLEST_USEFUL_GROUP = 16
NOT_CALIBRATED = "embeddings, and layers tied to one, are not calibrated, dynamic scales instead of static ones"


def widths_of(skeleton: PackedModule) -> list[int]:
    """Inputs of each packed parameter."""
    return [skeleton.matrix_shape(parameter)[1] for parameter in skeleton.packed_parameters]


def fitting_group(widths: Collection[int], group: int) -> int | None:
    """The largest group, up to the one asked for, that divides all widths; None where that is uselessly small."""
    fitting = next(size for size in range(group, 0, -1) if all(width % size == 0 for width in widths))
    return fitting if fitting >= min(_SMALLEST_USEFUL_GROUP, group) else None


def misfit(field: str, group: int, widths: Collection[int]) -> str:
    """What is wrong with a group that does not divide."""
    return f"{field}={group} does not divide the input width {' or '.join(map(str, sorted(set(widths))))}"


def fit_inputs(
    name: str, spec: LayerSpec, widths: Collection[int], is_table: bool, strict: bool, changes: dict[str, list[str]]
) -> LayerSpec:
    """A layer's spec with inputs that can be quantized like that.

    Args:
        widths: of :func:`widths_of`.
        is_table: an embedding, or tied to one.
        strict: refuse groups that do not divide.
        changes: what was changed -> names; the layer's is added.

    Raises:
        PlanError: a group that does not divide, with ``strict``.
    """
    activation = spec.activation
    if activation is None:
        return spec
    if activation.static and is_table:
        changes.setdefault(NOT_CALIBRATED, []).append(name)
        return replace(spec, activation=activation.dynamic())
    group = activation.group_size
    if group is None or (chosen := fitting_group(widths, group)) == group:
        return spec
    problem = misfit("activation_group_size", group, widths)
    if strict:
        raise PlanError(f"{name}: {problem}; use {chosen} for it (overrides), or strict_groups=False")
    instead = "one scale per token" if chosen is None else f"groups of {chosen}"
    changes.setdefault(f"{problem}, {instead} instead", []).append(name)
    return replace(spec, activation=replace(activation, group_size=chosen))
