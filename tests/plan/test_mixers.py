"""Plans of methods that pack state-space mixers whole: what is planned, what is left, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from hf_lowbit.config import LowbitConfig, LowRankConfig, MethodName
from hf_lowbit.nn import MixerSpec, PackedConv1d, PackedLinear, PackedMamba2, PackedMixer
from hf_lowbit.plan import ModelFacts, Plan, PlanError, build_plan, install, replace_modules
from tests.integrations.tiny_state_space import TINY

LAYERS = {
    "mamba": {"conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"},
    "mamba2": {"conv1d", "in_proj", "out_proj"},
}


@dataclass(kw_only=True, repr=False)
class Packs(LowbitConfig):
    """A method that packs mixers."""

    quant_method: ClassVar[MethodName] = MethodName("lowbit_packs")
    packs_mixers: ClassVar[bool] = True
    clusters: int | None = None

    def mixer_spec(self, name: str, kind: str) -> MixerSpec:
        activation = self.layer_spec(name).activation
        return MixerSpec(None if activation is None else 8, head_clusters=self.clusters, channel_clusters=self.clusters)


def config(**fields: Any) -> Packs:
    return Packs(**{"bits": 8, "activation_bits": 8, **fields})


@pytest.mark.parametrize("name", LAYERS)
def test_a_mixer_and_its_layers_are_planned(name: str) -> None:
    plan = build_plan(TINY[name].create(), config())
    mixer = plan.layers["backbone.layers.1.mixer"]
    assert mixer.kind == name and mixer.spec.mixer == MixerSpec(8)
    assert (mixer.spec.weight.bits, mixer.spec.weight.group_size) == (8, "tensor")
    own = {key.rpartition(".")[2] for key in plan.layers if key.startswith("backbone.layers.1.mixer.")}
    assert own == LAYERS[name]
    assert plan.layers["backbone.layers.1.mixer.conv1d"].spec.activation is None  # the mixer quantizes them
    assert plan.layers["backbone.layers.1.mixer.in_proj"].spec.activation is not None
    assert set(plan.skipped) == {"backbone.embeddings", "lm_head"}


@pytest.mark.parametrize("name", LAYERS)
def test_other_methods_leave_mixers_as_they_are(name: str) -> None:
    plan = build_plan(TINY[name].create(), LowbitConfig(bits=8))
    assert all(layer.spec.mixer is None for layer in plan.layers.values())
    assert "reads conv1d.weight itself" in plan.skipped["backbone.layers.0.mixer.conv1d"]


def test_layers_around_mixers_are_left_to_others() -> None:
    model = TINY["bamba"].create()
    plan = build_plan(model, config(quantize_lm_head=True), ModelFacts(frozenset({"lm_head"})))
    attention = "model.layers.1.self_attn.q_proj"
    assert plan.skipped[attention] == "not part of a state-space mixer: packs leaves it to another method"
    assert plan.layers["lm_head"].kind == "linear"
    assert "model.layers.0.mamba" in plan.layers and "model.layers.0.mamba.in_proj" in plan.layers
    assert not any("feed_forward" in key for key in plan.layers)


def test_exceptions() -> None:
    overrides = {"layers.1.mixer": {"activation_bits": None}}
    model = TINY["mamba2"].create()
    plan = build_plan(model, config(overrides=overrides))
    assert [plan.layers[f"backbone.layers.{i}.mixer"].spec.mixer for i in range(2)] == [MixerSpec(8), MixerSpec()]
    assert plan.layers["backbone.layers.1.mixer.in_proj"].spec.activation is None
    plan = build_plan(model, config(modules_to_not_convert=[r"backbone\.layers\.0\.mixer"]))  # it names no child
    assert "names" in plan.skipped["backbone.layers.0.mixer"]
    assert "part of backbone.layers.0.mixer" in plan.skipped["backbone.layers.0.mixer.in_proj"]
    plan = build_plan(model, config(modules_to_not_convert=["mixer.conv1d"]))
    assert "backbone.layers.0.mixer.conv1d" in plan.skipped and "backbone.layers.0.mixer" in plan.layers


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match="packs quantizes state-space mixers, and this Sequential has none"):
        build_plan(nn.Sequential(nn.Linear(8, 8)), config())
    with pytest.raises(PlanError, match=r"layers\.0\.mixer: head_clusters=3 exceeds the 2 heads"):
        build_plan(TINY["mamba2"].create(), config(clusters=3))
    with pytest.raises(PlanError, match=r"layers\.0\.mixer: .* generation 1"):
        build_plan(TINY["mamba"].create(), config(clusters=2))
    model = TINY["mamba"].create()
    model.backbone.layers[1].mixer.activation = "gelu"
    with pytest.raises(PlanError, match=r"layers\.1\.mixer: .*'gelu' is not supported; modules_to_not_convert"):
        build_plan(model, config())
    assert "backbone.layers.0.mixer" in build_plan(model, config(modules_to_not_convert=["layers.1.mixer"])).layers
    with pytest.raises(PlanError, match="does not reach the A_log and D"):
        build_plan(TINY["mamba"].create(), config(low_rank=LowRankConfig(rank=2, keep="adapter")))


def test_zamba_is_refused_by_name() -> None:
    from transformers import ZambaConfig, ZambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 64, "num_attention_heads": 4}
    layers = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
    with torch.device("meta"):
        model = ZambaForCausalLM(ZambaConfig(**sizes, **layers, intermediate_size=48))
    with pytest.raises(PlanError, match="ZambaMambaMixer is not supported: its x_proj and dt_proj"):
        build_plan(model, config())


@pytest.mark.parametrize("packed", [False, True])
def test_installed_and_put_back(packed: bool) -> None:
    """Mixers and their layers are replaced together, from a stored plan as well, and undone together."""
    model = TINY["mamba2"].create()
    before = dict(model.named_modules())
    entries = build_plan(model, config()).to_list()
    plan = Plan.from_list(entries, before)
    assert plan.layers == build_plan(model, config()).layers
    install(model, plan, packed=packed)
    mixer = model.backbone.layers[0].mixer
    assert type(mixer) is PackedMamba2 and type(mixer.in_proj) is PackedLinear and type(mixer.conv1d) is PackedConv1d
    assert hasattr(mixer, "site_x_scale") == packed and mixer.is_packed("A_log") == packed
    replace_modules(model, {name: before[name] for name in plan.layers})
    assert dict(model.named_modules()) == before
    assert not any(isinstance(module, PackedMixer) for module in model.modules())
