"""Groups of inputs follow the rule of weights' groups; tables have no stored input scales."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import hf_lowbit
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.plan import ModelFacts, Plan, PlanError, build_plan
from hf_lowbit.plan.groups import NOT_CALIBRATED, fitting_group

NO_FACTS = ModelFacts()


def plan(model: nn.Module, facts: ModelFacts = NO_FACTS, **values: Any) -> Plan:
    config = hf_lowbit.RTNConfig(bits=8, activation_bits=4, group_size=None, **values)
    return build_plan(model, config, facts)


@pytest.mark.parametrize(
    ("widths", "group", "fitting"),
    [([128], 64, 64), ([96, 160], 64, 32), ([100], 64, 50), ([101], 64, None), ([24], 8, 8), ([20], 16, None)],
)
def test_fitting_groups(widths: list[int], group: int, fitting: int | None) -> None:
    assert fitting_group(widths, group) == fitting


def test_groups_that_do_not_divide_shrink_or_go_and_are_noted() -> None:
    model = nn.ModuleDict({"a": nn.Linear(128, 8), "b": nn.Linear(100, 8), "c": nn.Linear(101, 8)})
    made = plan(model, activation_group_size=64)
    groups = [layer.spec.activation and layer.spec.activation.group_size for layer in made.layers.values()]
    assert groups == [64, 50, None]
    assert made.warnings == [
        "activation_group_size=64 does not divide the input width 100, groups of 50 instead: b (1 layer)",
        "activation_group_size=64 does not divide the input width 101, one scale per token instead: c (1 layer)",
    ]


@pytest.mark.parametrize(("width", "hint"), [(100, "use 50"), (101, "use None")])
def test_strict_groups_are_refused(width: int, hint: str) -> None:
    with pytest.raises(PlanError, match=f"1: activation_group_size=64 does not divide the input width {width}; {hint}"):
        plan(nn.Sequential(nn.Linear(128, 8), nn.Linear(width, 8)), activation_group_size=64, strict_groups=True)


def test_tables_and_what_is_tied_to_them_get_dynamic_scales() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 32), "head": nn.Linear(32, 10), "layer": nn.Linear(32, 32)})
    facts = ModelFacts(frozenset({"head"}), (frozenset({"embed", "head"}),))
    made = plan(model, facts, activation_static=True, quantize_embeddings=True)
    static = {name: layer.spec.activation and layer.spec.activation.static for name, layer in made.layers.items()}
    assert static == {"embed": False, "head": False, "layer": True}
    assert any(text.startswith(NOT_CALIBRATED) and "embed, head" in text for text in made.warnings)
    alone = plan(model, ModelFacts(frozenset({"head"})), activation_static=True, quantize_lm_head=True)
    assert alone.layers["head"].spec.activation == ActivationSpec("int", 4, static=True)
