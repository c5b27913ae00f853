"""Plans: every module with weights is planned or skipped for a reason, and a stored plan is read strictly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import LayerSpec, PackedEmbedding, PackedLinear
from hf_lowbit.plan import (
    ModelFacts,
    Plan,
    PlanError,
    PlannedLayer,
    build_plan,
    check_entries,
    install,
    packed_modules,
    replace_module,
    replace_modules,
)


def config(**values: Any) -> Any:
    return hf_lowbit.RTNConfig(**{"group_size": 16, **values})


class Own(nn.Module):
    """Multiplies by a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(4, 4))


class Reader(nn.Module):
    """Reads a child's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        return x @ self.inner.weight


class Zoo(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.renormalised = nn.Embedding(50, 32, max_norm=1.0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(32, 32), "norm": nn.LayerNorm(32)}) for _ in range(3))
        self.reader = Reader()
        self.own = Own()
        self.conv = nn.Conv2d(16, 8, 3)
        self.transposed = nn.ConvTranspose1d(4, 4, 3)
        self.narrow = nn.Conv1d(8, 8, 1, groups=8)
        self.kept = nn.Linear(32, 8)
        self.recurrent = nn.GRU(4, 4)
        self.lm_head = nn.Linear(32, 50)


FACTS = ModelFacts(output_heads=frozenset({"lm_head"}), full_precision=("kept",))


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def test_every_module_with_weights_is_planned_or_skipped() -> None:
    model = Zoo()
    plan = build_plan(model, config(), FACTS)
    with_weights = {
        name for name, module in model.named_modules() if any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    assert with_weights == {*plan.layers, *plan.skipped}
    assert not set(plan.layers) & set(plan.skipped)
    assert plan.others == set(names(model)) - with_weights


def test_reasons() -> None:
    plan = build_plan(Zoo(), config(modules_to_not_convert=["layers.1"]), FACTS)
    assert set(plan.layers) == {"layers.0.q", "layers.2.q", "conv"}
    reasons = {
        "embed": "quantize_embeddings=True packs it",
        "renormalised": "quantize_embeddings=True packs it",
        "layers.1.q": "modules_to_not_convert names 'layers.1'",
        "reader.inner": "Reader reads inner.weight itself",
        "own": "Own computes with its mixing itself",
        "transposed": "ConvTranspose1d is not supported",
        "narrow": "one input per output",
        "kept": "the model keeps 'kept' in float32",
        "recurrent": "GRU computes with its weight_ih_l0",
        "lm_head": "quantize_lm_head=True packs it",
    }
    assert set(plan.skipped) == set(reasons)
    assert all(reason in plan.skipped[name] for name, reason in reasons.items())


def test_ends_are_packed_when_asked() -> None:
    plan = build_plan(Zoo(), config(quantize_embeddings=True, quantize_lm_head=True), FACTS)
    assert plan.layers["embed"].kind == "embedding" and plan.layers["lm_head"].kind == "linear"
    assert "max_norm" in plan.skipped["renormalised"]


def test_overrides_the_first_match_wins() -> None:
    overrides = {
        "layers.0": {"bits": 8, "group_size": None},
        r"layers\.\d+\.q": {"format": "nf", "bits": 3},
        "q": {"bits": 2},
    }
    layers = build_plan(Zoo(), config(overrides=overrides), FACTS).layers
    assert layers["layers.0.q"].spec.weight == WeightSpec("int", 8)
    assert layers["layers.2.q"].spec.weight == WeightSpec("nf", 3, 16)
    assert layers["conv"].spec.weight == WeightSpec("int", 4, 16)


def test_a_pattern_that_matches_nothing_is_a_warning() -> None:
    plan = build_plan(Zoo(), config(modules_to_not_convert=["lm_haed"], overrides={"up_proj": {"bits": 8}}), FACTS)
    assert [w for w in plan.warnings if "'lm_haed' matches no module" in w]
    assert [w for w in plan.warnings if "'up_proj' matches no module" in w]


@pytest.mark.parametrize(
    ("width", "group_size", "chosen", "said"),
    [
        (48, 32, 24, "groups of 24"),
        (40, 16, None, "one scale per row"),
        (30, 128, 30, "groups of 30"),
        (6, 4, None, "one scale per row"),
    ],
)
def test_groups_that_do_not_divide_shrink_with_a_warning(
    width: int, group_size: int, chosen: int | None, said: str
) -> None:
    model = nn.ModuleList(nn.Linear(width, 8) for _ in range(3))
    plan = build_plan(model, config(group_size=group_size))
    assert {layer.spec.weight.group_size for layer in plan.layers.values()} == {chosen}
    (warning,) = plan.warnings
    assert f"group_size={group_size} does not divide the input width {width}" in warning
    assert said in warning and "* (3 layers)" in warning


@pytest.mark.parametrize(("width", "fix"), [(48, "a group_size of 24"), (37, "group_size=None")])
def test_strict_groups_refuse_and_name_layer_and_fix(width: int, fix: str) -> None:
    model = nn.ModuleDict({"fine": nn.Linear(64, 8), "odd": nn.Linear(width, 8)})
    with pytest.raises(PlanError, match=f"^odd: group_size=32 does not divide the input width {width}; use {fix}"):
        build_plan(model, config(group_size=32, strict_groups=True))


def test_nothing_to_quantize_is_refused_with_reasons() -> None:
    with pytest.raises(PlanError, match=r"nothing to quantize in this Linear .*single layer"):
        build_plan(nn.Linear(32, 32), config())
    with pytest.raises(PlanError, match="no layers with weights"):
        build_plan(nn.Sequential(nn.ReLU()), config())


# tied weights
class Tied(nn.Module):
    """Embedding and output share a weight, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
        self.lm_head.weight = self.embed.weight


TIED = ModelFacts(output_heads=frozenset({"lm_head"}), tied=(frozenset({"embed", "lm_head"}),))


def test_tied_ends_are_skipped_together() -> None:
    plan = build_plan(Tied(), config(), TIED)
    assert set(plan.layers) == {"body"}
    assert plan.skipped["embed"].startswith("tied to lm_head") and plan.skipped["lm_head"].startswith("tied to embed")


@pytest.mark.parametrize("flag", ["quantize_embeddings", "quantize_lm_head"])
def test_either_flag_packs_both_tied_ends(flag: str) -> None:
    layers = build_plan(Tied(), config(**{flag: True}), TIED).layers
    assert layers["embed"].spec == layers["lm_head"].spec


def test_tied_modules_with_different_specifications_stay_float() -> None:
    plan = build_plan(Tied(), config(quantize_embeddings=True, overrides={"embed": {"bits": 8}}), TIED)
    assert set(plan.layers) == {"body"}
    assert "another specification" in plan.skipped["embed"] and "another specification" in plan.skipped["lm_head"]


def test_a_tied_module_does_not_stay_packed_alone() -> None:
    plan = build_plan(Tied(), config(quantize_embeddings=True, modules_to_not_convert=["lm_head"]), TIED)
    assert "which is not packed" in plan.skipped["embed"]


# storing
def stored(plan: Plan) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(json.dumps(plan.to_list()))
    return entries


def test_alike_layers_are_one_pattern() -> None:
    plan = build_plan(Zoo(), config(), FACTS)
    (entry,) = [entry for entry in stored(plan) if entry["kind"] == "linear"]
    assert entry["modules"] == ["layers.*.q"]


@pytest.mark.parametrize(
    "values",
    [{}, {"overrides": {"layers.1": {"bits": 8}}}, {"modules_to_not_convert": ["layers.1"]},
     {"activation_bits": 8, "low_rank": {"rank": 2}}, {"format": "codebook", "bits": 3}, {"quantize_embeddings": True}],
)  # fmt: skip
def test_a_stored_plan_resolves_to_the_same_layers(values: dict[str, Any]) -> None:
    model = Zoo()
    plan = build_plan(model, config(**values), FACTS)
    assert Plan.from_list(stored(plan), names(model)).layers == plan.layers


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)),
     nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Dropout()) for _ in range(2)),
     nn.ModuleList([nn.Linear(32, 32), nn.Identity(), nn.Sequential(nn.Linear(32, 32))])],
)  # fmt: skip
def test_a_pattern_stands_for_no_module_that_was_not_planned(model: nn.Module) -> None:
    plan = build_plan(model, config())
    resolved = Plan.from_list(stored(plan), names(model))
    assert resolved.layers == plan.layers
    install(model, resolved, packed=True)


def entries(*modules: str, kind: str = "linear") -> list[dict[str, Any]]:
    return [{"kind": kind, "weight": {"bits": 4}, "modules": list(modules)}]


def test_a_plan_that_names_a_missing_module_is_refused() -> None:
    with pytest.raises(PlanError, match=r"names 'layers\.\*\.k', which this model does not have"):
        Plan.from_list(entries("layers.*.q", "layers.*.k"), ["layers.0.q"])


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="another architecture"):
        Plan.from_list(entries("encoder.q"), ["layers.0.q"], prefix="model")


@pytest.mark.parametrize(
    ("pattern", "model_names", "found"),
    [
        ("model.layers.*.q", ["model.layers.0.q", "lm_head"], ["model.layers.0.q"]),
        ("model.layers.*.q", ["layers.0.q"], ["layers.0.q"]),  # saved with a head, loaded without
        ("layers.*.q", ["model.layers.0.q", "lm_head"], ["model.layers.0.q"]),  # the other way round
    ],
)
def test_prefixes_of_models_with_and_without_a_head(pattern: str, model_names: list[str], found: list[str]) -> None:
    assert list(Plan.from_list(entries(pattern), model_names, "model").layers) == found


def test_a_head_that_this_model_lacks_is_no_error() -> None:
    plan = Plan.from_list(entries("model.layers.*.q", "lm_head"), ["layers.0.q"], "model")
    assert list(plan.layers) == ["layers.0.q"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"kind": "torch.nn.Linear", "weight": {}, "modules": ["a"]},
            "unknown kind of packed module 'torch.nn.Linear'",
        ),
        ({"kind": "os.system", "weight": {}, "modules": ["a"]}, "registered: linear"),
        ({"weight": {}, "modules": ["a"]}, "unknown kind"),
        ({"kind": "linear", "modules": ["a"]}, "entry for a cannot be read"),
        ({"kind": "linear", "weight": {"bits": 4}, "modules": "a"}, "lists its modules by name"),
        ({"kind": "linear", "weight": {"bits": 4}, "modules": [3]}, "lists its modules by name"),
        ({"kind": "linear", "weight": {"bits": 11}, "modules": ["a", "b"]}, "entry for a, b cannot be read: .*1 to 8"),
        ({"kind": "linear", "weight": {"bitz": 4}, "modules": ["a"]}, "unknown field.*bitz"),
        ({"kind": "linear", "weight": [4], "modules": ["a"]}, "cannot be read"),
        ({"kind": "linear", "weight": {"format": "codebook", "codebook": ["x"]}, "modules": ["a"]}, "list of numbers"),
        ({"kind": "linear", "weight": {}, "code": "x.py", "modules": ["a"]}, "cannot be read"),
        ({"kind": "linear", "weight": {}, "low_rank": -2, "modules": ["a"]}, "low_rank"),
        (3, "is an object"),
    ],
)
def test_entries_that_cannot_be_read_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_entries([entry])
    with pytest.raises(PlanError, match=message):
        Plan.from_list([entry], ["a", "b"])


def test_a_plan_is_a_list() -> None:
    with pytest.raises(PlanError, match="a plan is a list"):
        check_entries({"layers": []})


# installing
def test_install_leaves_everything_else_alone() -> None:
    model = Zoo().eval()
    plan = build_plan(model, config(), FACTS)
    before = dict(model.named_modules())
    install(model, plan, packed=True)
    assert set(packed_modules(model)) == set(plan.layers)
    assert all(before[name] is module for name, module in model.named_modules() if name in plan.skipped)
    assert not any(module.training for module in model.modules())


def test_install_unpacked_shares_the_float_parameters() -> None:
    model = Zoo()
    weight = model.conv.weight
    install(model, build_plan(model, config(), FACTS), packed=False)
    assert model.conv.weight is weight


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    model = nn.Module()
    model.first = nn.Linear(32, 32)
    model.second = model.first
    install(model, build_plan(model, config()), packed=True)
    assert isinstance(model.first, PackedLinear) and model.second is model.first


def test_a_stored_group_that_does_not_fit_names_the_layer() -> None:
    plan = Plan({"inner": PlannedLayer("linear", LayerSpec(WeightSpec(group_size=20)))})
    with pytest.raises(PlanError, match=r"inner.*group_size=20 does not divide"):
        install(nn.ModuleDict({"inner": nn.Linear(32, 8)}), plan, packed=True)


def test_a_failed_install_changes_nothing() -> None:
    model = nn.ModuleDict({"first": nn.Linear(32, 8), "second": nn.LayerNorm(8)})
    layer = PlannedLayer("linear", LayerSpec(WeightSpec()))
    with pytest.raises(PlanError):
        install(model, Plan({"first": layer, "second": layer}), packed=True)
    assert type(model["first"]) is nn.Linear


def test_the_model_itself_cannot_be_replaced() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(PlanError, match="wrap it"):
        replace_module(model, "", nn.ReLU())
    with pytest.raises(PlanError, match="wrap it"):
        replace_modules(model, {"": nn.ReLU()})


def test_kinds_are_registered_names() -> None:
    assert PackedEmbedding.kind == "embedding"
    with pytest.raises(PlanError, match="unknown kind"):
        PlannedLayer("hf_lowbit.nn.PackedLinear", LayerSpec(WeightSpec()))
