"""What a mixer's specification may say, and how it lies in a plan."""

from __future__ import annotations

from typing import Any

import pytest

from hf_lowbit.formats import SpecError, WeightSpec
from hf_lowbit.nn import LayerSpec, MixerSpec
from hf_lowbit.plan import Plan, PlanError, PlannedLayer

WEIGHTS = WeightSpec(bits=8, group_size="tensor", scale_dtype="float32")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"activation_bits": 4}, "activation_bits must be 8"),
        ({"activation_bits": True}, "activation_bits must be 8"),
        ({"state_bits": 8}, "state_bits need activation_bits"),
        ({"group_scales": True}, "group_scales need activation_bits"),
        ({"activation_bits": 8, "group_scales": 1}, "group_scales must be True or False"),
        ({"activation_bits": 8, "channel_states": True}, "channel_states need state_bits"),
        ({"activation_bits": 8, "head_clusters": 4}, "given together"),
        ({"activation_bits": 8, "head_clusters": 0, "channel_clusters": 4}, "positive"),
        ({"head_clusters": 2, "channel_clusters": 2}, "need activation_bits"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        MixerSpec(**fields)


@pytest.mark.parametrize("mixer", [MixerSpec(), MixerSpec(8, 8), MixerSpec(8, None, True), MixerSpec(8, 8, True, 4, 2)])
def test_a_plan_holds_it(mixer: MixerSpec) -> None:
    layer = PlannedLayer("mamba2", LayerSpec(WEIGHTS, mixer=mixer))
    entries = Plan({"layers.0.mixer": layer}).to_list()
    assert Plan.from_list(entries, ["layers.0.mixer"]).layers == {"layers.0.mixer": layer}


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("mamba", {}, "specification 'mixer'"),
        ("linear", {"mixer": {}}, "specification 'mixer'"),
        ("mamba", {"mixer": {"bits": 8}}, "unknown field"),
        ("mamba", {"mixer": [8]}, "is an object"),
    ],
)
def test_entries_that_are_refused(kind: str, values: dict[str, Any], told: str) -> None:
    entry = {"kind": kind, "weight": WEIGHTS.to_dict(), "modules": ["mixer"], **values}
    with pytest.raises(PlanError, match=told):
        Plan.from_list([entry], ["mixer"])
