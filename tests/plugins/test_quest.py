"""QuEST: what its method page promises, on the trained denoisers; how layers are trained is in test_selective."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lowbit
import hf_lowbit_quest
from hf_lowbit import QuESTConfig
from hf_lowbit.calibration.roles import Roles, find_roles
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import unpack_codes
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit_quest.stages import select, stages_of
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.denoisers import calls_of, float_denoiser, quantized, signal_to_noise

W4A4: dict[str, Any] = {"bits": 4, "activation_bits": 4, "iterations": 0, "search_clip": False}
SHORT = {"steps": 3, "samples": 4}
ENOUGH = {"steps": 4, "samples": 16}  # that each stage helps, however a machine rounds
ROLES = Roles(("emb.linear", "norm1.linear"), ("first", "last"), ("a.ff.net.0", "a.ff.net.2", "a.to_q", "a.conv"))


@pytest.fixture(scope="module")
def start() -> Any:
    """The DiT, W4A4, without finetuning."""
    return quantized("dit-fashion", QuESTConfig(**W4A4, epochs=0), **ENOUGH)


@pytest.fixture(scope="module")
def finetuned(start: Any) -> tuple[Any, list[str]]:
    """The same, finetuned, and what the report says."""
    model, original, data = copy.deepcopy(start), float_denoiser("dit-fashion"), calls_of("dit-fashion", **ENOUGH)
    recipe = hf_lowbit_quest.METHOD.make_recipe(QuESTConfig(**W4A4, epochs=4))
    assert recipe.prepare is not None and recipe.refine is not None
    recipe.prepare(original, data)
    return model, recipe.refine(original, model, data)


def codes(model: nn.Module) -> dict[str, Tensor]:
    packed = {name: module.packed() for name, module in packed_modules(model).items()}
    return {name: unpack_codes(p.weight, p.spec.bits, p.columns) for name, p in packed.items()}


# 1, 4
def test_only_selected_layers_weights_change_on_the_same_grid(start: Any, finetuned: tuple[Any, list[str]]) -> None:
    before, after = fingerprint(start), fingerprint(finetuned[0])
    changed = {name for name in before if before[name] != after[name]}
    tables = {name for name in changed if ".weight_input_" in name}
    assert len(tables) > 50
    others = changed - tables
    assert others and all(".ff.net." in name or "norm1" in name or "proj_out_1" in name for name in others)
    assert all(name.endswith((".weight", ".bias")) for name in others), "codes and biases: no scale, no zero point"
    assert not any(".ff.net." in name and name.endswith(".bias") for name in others)
    moved = {name: (codes(finetuned[0])[name].int() - code.int()).abs() for name, code in codes(start).items()}
    assert 0 < max(float(m.float().mean()) for m in moved.values()) < 0.5


# 2, 7
def test_trajectories_that_nothing_was_fitted_to_gain(start: Any, finetuned: tuple[Any, list[str]]) -> None:
    assert signal_to_noise("dit-fashion", finetuned[0]) > signal_to_noise("dit-fashion", start) + 0.1
    assert len(finetuned[1]) == 2 and "are finetuned: the error of the model's output on held-out" in finetuned[1][1]


# 3
def test_a_table_of_equal_scales_is_one_scale(start: Any) -> None:
    table, single = copy.deepcopy(start), copy.deepcopy(start)
    for name, module in packed_modules(table).items():
        scale, shift = (tensor[:1] for tensor in module.input_table() if tensor is not None)
        other = single.get_submodule(name)
        other.layer_spec = replace(other.layer_spec, activation=replace(other.layer_spec.activation, timesteps=None))
        other.set_input_scale("weight", scale[0], shift[0])
        rows = len(module.layer_spec.activation.timesteps or ())
        module.set_input_scale("weight", scale.expand(rows, -1), shift.expand(rows, -1))
    for batch in calls_of("dit-fashion", seed=7, **SHORT):
        with torch.no_grad():
            assert torch.equal(table(**batch)[0], single(**batch)[0])
            assert not torch.equal(start(**batch)[0], single(**batch)[0]) or batch["timestep"][0] > 600


# 6
def test_embeddings_of_timesteps_stay_near_and_do_not_collapse(start: Any, finetuned: tuple[Any, list[str]]) -> None:
    original = float_denoiser("dit-fashion")
    float_, before, after = (embeddings(model) for model in (original, start, finetuned[0]))
    for name in float_:
        near = [F.cosine_similarity(each[name], float_[name], dim=-1).mean() for each in (before, after)]
        assert near[1] > near[0] - 0.01 and near[1] > 0.98
        apart = [F.cosine_similarity(each[name][0], each[name][-1], dim=-1) for each in (float_, before, after)]
        assert apart[2] < apart[1] + 0.1 and apart[2] < apart[0] + 0.15


def embeddings(model: Any) -> dict[str, Tensor]:
    """Outputs of the time layers of each block, ``[timesteps, channels]``."""
    found: dict[str, list[Tensor]] = {}
    names = [name for name, _ in model.named_modules() if name.endswith("norm1.linear")]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.setdefault(name, []).append(output[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in calls_of("dit-fashion", seed=7, **SHORT):
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(outputs) for name, outputs in found.items()}


def test_it_saves_and_reloads_bit_equal(finetuned: tuple[Any, list[str]], tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    finetuned[0].save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(finetuned[0])
    batch = calls_of("dit-fashion", seed=7, **SHORT)[1]
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], finetuned[0](**batch)[0])


def test_a_unet_is_quantized_and_finetuned() -> None:
    model = quantized("sd-fashion", QuESTConfig(**W4A4, epochs=1, step_samples=1), steps=2, samples=1)
    specs = {name: module.layer_spec.activation for name, module in packed_modules(model).items()}
    assert {specs[name].bits for name in ("conv_in", "conv_out")} == {8}
    assert specs["conv_in"].group_size is None
    assert {spec.bits for name, spec in specs.items() if name not in ("conv_in", "conv_out")} == {4}
    assert {len(spec.timesteps) for spec in specs.values()} == {2}
    parts = [line for line in hf_lowbit.report(model).warnings if "concatenated input" in line]
    assert len(parts) == 1 and "conv_shortcut (4 layers)" in parts[0]
    lines = [line for line in hf_lowbit.report(model).warnings if "held-out" in line]
    assert "10 weights" in lines[0] and "14 weights" in lines[1], "all projections of time, and all feed-forward layers"
    assert signal_to_noise("sd-fashion", model) > 3


def test_layers_are_found_in_the_trained_denoisers() -> None:
    unet = find_roles(float_denoiser("sd-fashion"), calls_of("sd-fashion", steps=1, samples=1)[0])
    assert {name.rpartition(".")[2] for name in unet.time} == {"linear_1", "linear_2", "time_emb_proj"}
    assert len(unet.time) == 10 and unet.ends == ("conv_in", "conv_out")
    dit = find_roles(float_denoiser("dit-fashion"), calls_of("dit-fashion", steps=1, samples=1)[0])
    assert len(dit.time) == 19 and "proj_out_1" in dit.time and dit.ends == ("pos_embed.proj", "proj_out_2")


def test_layers_are_selected_by_their_role_or_by_patterns() -> None:
    usual = select(ROLES, QuESTConfig())
    assert usual.time == ROLES.time and usual.sensitive == ("a.ff.net.0", "a.ff.net.2")
    attention = replace(ROLES, others=("a.to_q", "a.conv"))
    assert select(attention, QuESTConfig()).sensitive == ("a.to_q",)
    own = select(ROLES, QuESTConfig(time_layers=["norm1.linear"], sensitive_layers=[r".*conv"]))
    assert own.time == ("norm1.linear",) and own.sensitive == ("a.conv",)


def test_stages_train_what_the_paper_says(start: Any) -> None:
    selection = select(find_roles(float_denoiser("dit-fashion"), calls_of("dit-fashion", **SHORT)[0]), QuESTConfig())
    first, second = stages_of(start, selection, QuESTConfig(epochs=20), steps=100)
    assert first.weights == first.biases == first.inputs == selection.time
    assert second.weights == selection.sensitive and second.biases == ()
    assert {*first.inputs, *second.inputs} == {*packed_modules(start)} and not {*first.inputs} & {*second.inputs}
    assert (first.weight_rate, first.input_rate, second.input_rate) == (1e-5, 1e-5, 1e-4)
    assert stages_of(start, selection, QuESTConfig(epochs=4), steps=100)[0].weight_rate == pytest.approx(5e-5)


def test_time_layers_may_have_one_scale_for_all_timesteps() -> None:
    config = QuESTConfig(**W4A4, epochs=0, per_timestep_scales=False)
    specs = {
        n: m.layer_spec.activation
        for n, m in packed_modules(quantized("dit-fashion", config, steps=2, samples=1)).items()
    }
    assert specs["transformer_blocks.0.norm1.linear"].timesteps is None
    assert len(specs["transformer_blocks.0.attn1.to_q"].timesteps) == 2


def test_w4a4_has_equal_groups_of_weights_and_inputs() -> None:
    assert (QuESTConfig(activation_bits=4).activation_group_size, QuESTConfig(activation_bits=4).group_size) == (32, 32)
    assert QuESTConfig(activation_bits=4, activation_group_size=1).group_size is None
    assert QuESTConfig().activation_group_size is None and QuESTConfig().group_size is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_static": False, "activation_timesteps": False}, "activation_static and activation_timesteps"),
        ({"activation_timesteps": False}, "activation_static and activation_timesteps"),
        ({"activation_bits": None, "activation_static": False, "activation_timesteps": False,
          "activation_symmetric": True}, "inputs must be quantized"),
        ({"time_layers": []}, "time_layers must be a list"),
        ({"sensitive_layers": ["["]}, "sensitive_layers: .* not a valid regular expression"),
        ({"format": "codebook"}, "split=True rounds the parts"),
        ({"split": 1}, "split must be True or False"),
        ({"epochs": -1}, "epochs must be an integer"),
        ({"step_samples": 0}, "step_samples must be an integer"),
        ({"input_rate": 0.0}, "input_rate must be a number"),
        ({"end_bits": 5}, "end_bits must be"),
        ({"activation_percentile": 99.0}, "search_inputs=False"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuESTConfig(**values)


@pytest.mark.parametrize("field", ["time_layers", "sensitive_layers"])
def test_a_pattern_that_no_layer_matches_is_refused_before_anything_changes(field: str) -> None:
    model, data = float_denoiser("dit-fashion"), calls_of("dit-fashion", **SHORT)
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=f"{field} names 'nowhere'"):
        hf_lowbit.quantize(model, QuESTConfig(**{field: ["nowhere"]}, num_samples=8), data=data)
    assert fingerprint(model) == before


def test_data_without_timesteps_are_refused() -> None:
    data = [{key: value for key, value in batch.items() if key != "timestep"} for batch in calls_of("dit-fashion")]
    with pytest.raises((ConfigError, PlanError), match="timestep"):
        hf_lowbit.quantize(float_denoiser("dit-fashion"), QuESTConfig(num_samples=8), data=data)
    llama = MODELS["llama"].build().eval()
    with pytest.raises((ConfigError, PlanError), match="timestep"):
        hf_lowbit.quantize(llama, QuESTConfig(num_samples=1), data=[{"input_ids": torch.arange(16)[None]}])
    recipe = hf_lowbit_quest.METHOD.make_recipe(QuESTConfig())
    with pytest.raises(ConfigError, match="QuEST is for denoisers"):
        recipe.prepare(llama, [{"input_ids": torch.arange(16)[None]}])  # type: ignore[misc]
