"""fp_diffusion: what its method page promises of whole models; grids and searches have tests of their own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
import hf_lowbit.calibration.adaptive
from hf_lowbit import FPDiffusionConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import reconstruct
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import decode
from hf_lowbit.formats.floating_point import SPLITS, unsigned_splits
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding.floating_point import round_floating_point
from hf_lowbit.rounding.learned import AdaptiveRounding
from hf_lowbit.rounding.learned.soft import rectified_sigmoid
from tests.matrix.conftest import data_of
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.denoisers import float_denoiser, quantized, signal_to_noise

REST = [
    r"(down_blocks|mid_block|up_blocks\.0|up_blocks\.1\.resnets|time_embedding).*"
]  # what a test of one part of the U-Net leaves float
SHORT: dict[str, Any] = {"iterations": 4}


@cache
def float_tiny(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name].build().eval()


def tiny(name: str, data: Any = None, **values: Any) -> Any:
    """A random model, quantized."""
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    return hf_lowbit.quantize(model, FPDiffusionConfig(num_samples=2, **values), data=data)


def formats(model: Any) -> dict[str, tuple[str, str | None]]:
    """Of weights and inputs."""
    specs = {name: module.layer_spec for name, module in packed_modules(model).items()}
    return {n: (s.weight.format, None if s.activation is None else s.activation.format) for n, s in specs.items()}


def error(name: str, model: Any) -> float:
    expected, found = MODELS[name].run(float_tiny(name)), MODELS[name].run(model)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["text_unet", "dit"])
def test_without_data_weights_are_searched_and_rounded_to_nearest(name: str) -> None:
    model = tiny(name, bits=4, activation_static=False, group_size=None if name == "dit" else "tensor")
    for layer, module in packed_modules(model).items():
        weight = float_tiny(name).get_submodule(layer).weight.detach()
        expected = round_floating_point(module.to_matrix("weight", weight), module.layer_spec.weight)
        assert torch.equal(decode(module.packed()), decode(expected)), layer
    assert {inputs for _, inputs in formats(model).values()} == {"fp_e2m5", None}
    assert {weight for weight, _ in formats(model).values()} <= {*SPLITS[4], *SPLITS[8]}


def test_widths_are_ordered() -> None:
    found = [
        error(
            "text_unet",
            tiny("text_unet", bits=bits, activation_bits=inputs, activation_static=False, group_size="tensor"),
        )
        for bits, inputs in ((8, 8), (6, 6), (4, 8), (4, 4))
    ]
    assert found == sorted(found) and found[0] < 0.08
    full = error("text_unet", tiny("text_unet", bits=4, activation_bits=None, group_size="tensor"))
    assert full < found[2] * 1.02


@pytest.mark.parametrize(
    ("name", "edges"), [("text_unet", ["conv_in", "conv_out"]), ("dit", ["pos_embed.proj", "proj_out_2"])]
)
def test_the_ends_of_the_model_have_eight_bits(name: str, edges: list[str]) -> None:
    asked: dict[str, Any] = {"bits": 4, "activation_bits": 6, "activation_static": False, "group_size": "tensor"}
    specs = {n: m.layer_spec for n, m in packed_modules(tiny(name, **asked)).items()}
    assert [specs[edge].weight.bits for edge in edges] == [8, 8]
    assert specs[edges[0]].activation is None and specs[edges[1]].activation.bits == 8, "latents are as they are"
    inner = [n for n in specs if "attn1" in n]
    assert inner and all((specs[n].weight.bits, specs[n].activation.bits) == (4, 6) for n in inner)
    alike = packed_modules(tiny(name, edge_bits=None, **asked))
    assert {m.layer_spec.weight.bits for m in alike.values()} == {4}
    asked |= {"overrides": {edges[1]: {"bits": 6}}, "latent_bits": 7}
    own = {n: m.layer_spec for n, m in packed_modules(tiny(name, **asked)).items()}
    assert own[edges[1]].weight.bits == 6 and own[edges[0]].activation.format == "fp_e2m4"


@pytest.mark.parametrize("name", ["text_unet", "dit"])
def test_every_layer_finds_formats_of_its_own(name: str) -> None:
    model = tiny(name, data_of(MODELS[name]), bits=8, group_size="tensor")
    found = formats(model)
    assert all(weight in SPLITS[8] for weight, _ in found.values())
    assert all(inputs in (None, *SPLITS[8], *unsigned_splits(8)) for _, inputs in found.values())
    specs = [m.layer_spec.activation for m in packed_modules(model).values() if m.layer_spec.activation is not None]
    assert len({spec.format for spec in specs}) > 1
    shifted = [spec for spec in specs if spec.shift]
    assert shifted and len(shifted) < len(specs) and all(spec.static for spec in specs)
    assert error(name, model) < 0.08
    plain = tiny(name, data_of(MODELS[name]), bits=8, group_size="tensor", activation_shift=False)
    inputs = [module.layer_spec.activation for module in packed_modules(plain).values()]
    assert not any(spec is not None and spec.shift for spec in inputs)


def test_layers_that_read_a_concatenation_have_scales_for_its_parts() -> None:
    model = tiny("text_unet", data_of(MODELS["text_unet"]), bits=5, iterations=0)
    shortcuts = {n: m for n, m in packed_modules(model).items() if n.startswith("up_blocks") and "shortcut" in n}
    assert shortcuts
    for module in shortcuts.values():
        group = module.layer_spec.weight.group_size
        assert group == module.layer_spec.activation.group_size < module.in_channels
        assert module.input_scale().numel() == module.in_channels // group > 1
    whole = packed_modules(tiny("text_unet", data_of(MODELS["text_unet"]), bits=5, split=False, group_size="tensor"))
    assert all(module.layer_spec.weight.group_size == "tensor" for module in whole.values())


# 4
def test_learned_roundings_are_neighbours_decided_and_lose_less(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, decided, moved = [], [], []

    def spy(block: Block, learned: dict[str, AdaptiveRounding], training: Any) -> Any:
        def loss() -> float:
            hard = {key: block.matrices[key].skeleton.from_matrix("weight", w.hard()) for key, w in learned.items()}
            total = 0.0
            for batch in range(len(block)):
                args, kwargs = block.arguments(batch)
                output = block.output_of(torch.func.functional_call(block.module, hard, args, kwargs))
                total += float((output - block.target(batch)).square().sum())
            return total

        before, codes = loss(), {key: weight.final()[0] for key, weight in learned.items()}
        result = reconstruct(block, learned, training)
        losses.append((before, loss()))
        for key, weight in learned.items():
            raised = weight.final()[0] - weight.below
            assert raised.min() >= 0 and raised.max() <= 1
            h = rectified_sigmoid(weight.logits.detach())[weight.span > 0]
            decided.append(((h < 1e-2) | (h > 1 - 1e-2)).float().mean().item())
            moved.append((weight.final()[0] != codes[key]).float().mean().item())
        return result

    monkeypatch.setattr(hf_lowbit.calibration.adaptive, "reconstruct", spy)
    tiny("dit", data_of(MODELS["dit"]), bits=4, activation_bits=None, iterations=300, learning_rate=0.05)
    assert losses and all(after <= before for before, after in losses)
    assert sum(after for _, after in losses) < 0.5 * sum(before for before, _ in losses)
    assert min(decided) > 0.99 and max(moved) < 0.5 and any(share > 0.02 for share in moved)


def test_only_narrow_weights_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def spy(block: Block, learned: dict[str, AdaptiveRounding], training: Any) -> Any:
        trained.extend(block.full_name(key) for key in learned)
        return reconstruct(block, learned, training)

    monkeypatch.setattr(hf_lowbit.calibration.adaptive, "reconstruct", spy)
    tiny("dit", data_of(MODELS["dit"]), bits=4, **SHORT)
    assert trained and not any("norm1" in name or "proj_out" in name for name in trained), "eight bits at the edges"
    trained.clear()
    tiny("dit", data_of(MODELS["dit"]), bits=6, **SHORT)
    tiny("dit", data_of(MODELS["dit"]), bits=4, iterations=0)
    assert not trained
    tiny("dit", data_of(MODELS["dit"]), bits=6, learned_bits=6, **SHORT)
    assert trained


# 6
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("text_unet", {"bits": 4, "group_size": "tensor"}),
        ("dit", {"bits": 4, "activation_timesteps": True}),
        ("dit", {"bits": 6, "activation_bits": 6, "activation_static": False}),
    ],
)
def test_saved_and_loaded_it_is_the_same_to_the_last_bit(tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    model = tiny(name, data_of(MODELS[name]), **values, **SHORT)
    model.save_pretrained(tmp_path / "packed")
    again = MODELS[name].load(tmp_path / "packed", torch.float32)
    assert fingerprint(again) == fingerprint(model) and formats(again) == formats(model)
    assert torch.equal(MODELS[name].run(again), MODELS[name].run(model))


def test_experts_of_a_layer_share_their_formats() -> None:
    model = tiny("qwen3_moe", data_of(MODELS["qwen3_moe"]), bits=4, **SHORT)
    experts = [m.layer_spec for m in packed_modules(model).values() if m.kind == "experts"]
    assert experts and all(spec.weight.format in SPLITS[4] for spec in experts)
    assert all(spec.activation is not None and spec.activation.static for spec in experts)
    assert error("qwen3_moe", model) < 0.3


# 5
def test_trained_denoisers_keep_the_papers_order() -> None:
    """Of one part of the U-Net, so that training it takes seconds."""
    values: dict[str, Any] = {"modules_to_not_convert": REST}

    def decibels(**more: Any) -> float:
        return signal_to_noise("sd-fashion", quantized("sd-fashion", FPDiffusionConfig(**values, **more), samples=2))

    eight, nearest = decibels(bits=8), decibels(bits=4, iterations=0)
    learned = decibels(bits=4, iterations=60)
    assert eight > learned > nearest, (eight, learned, nearest)


def test_a_trained_transformer_without_data() -> None:
    model = float_denoiser("dit-fashion")
    hf_lowbit.quantize(model, FPDiffusionConfig(bits=4, activation_bits=None, group_size="tensor"))
    assert signal_to_noise("dit-fashion", model) > 12


def test_what_is_asked_of_inputs() -> None:
    full = FPDiffusionConfig(activation_bits=None)
    assert full.layer_spec("x").activation is None and not full.has_static_inputs
    dynamic = FPDiffusionConfig(activation_static=False).layer_spec("x").activation
    assert dynamic is not None and dynamic.format == "fp_e2m5" and not dynamic.shift
    given = FPDiffusionConfig(activation_format="fp_e4m3").layer_spec("x").activation
    assert given is not None and given.format == "fp_e4m3" and given.static and given.shift
    latents = FPDiffusionConfig(activation_format="fp_e4m3", latent_bits=6).layer_spec("conv_in").activation
    assert latents is not None and (latents.format, latents.bits) == ("fp", 6)
    integers = FPDiffusionConfig(activation_format="int").layer_spec("x").activation
    assert integers is not None and integers.format == "int" and not integers.shift
    assert FPDiffusionConfig.from_dict(full.to_dict()).to_dict() == full.to_dict()


def test_rates() -> None:
    assert FPDiffusionConfig(iterations=50).rate == pytest.approx(0.05)
    assert FPDiffusionConfig(iterations=50, scale_aware=True).rate == 1e-3
    assert FPDiffusionConfig(iterations=50, scale_aware=True, learning_rate=0.1).rate == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"edge_bits": 9}, "edge_bits must be an integer from 0 to 8, not 9"),
        ({"latent_bits": True}, "latent_bits must be an integer from 0 to 8, not True"),
        ({"learned_bits": None}, "learned_bits must be an integer from 0 to 8, not None"),
        ({"scale_aware": 1}, "scale_aware must be True or False, not 1"),
        ({"symmetric": False}, "format 'fp' is symmetric"),
        ({"bits": 3}, "format 'fp' allows 4 to 8 bits, not bits=3"),
        ({"activation_bits": 3}, "not to 'fp' with 3 bits"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FPDiffusionConfig(**values)


def test_data_is_asked_for_where_it_is_needed() -> None:
    with pytest.raises(ConfigError, match="'fp_diffusion' needs calibration data"):
        hf_lowbit.quantize(float_tiny("dit"), FPDiffusionConfig())


def test_other_methods_do_not_search_splits() -> None:
    with pytest.raises(ConfigError, match="format 'fp' leaves exponent and mantissa open"):
        hf_lowbit.RTNConfig(format="fp")
    with pytest.raises(ConfigError, match="need a method that searches exponent and mantissa"):
        hf_lowbit.SmoothQuantConfig(activation_format="fp", activation_static=True)
    given = hf_lowbit.RTNConfig(activation_format="fp_e2m3").layer_spec("x").activation
    assert given is not None and (given.format, given.bits) == ("fp_e2m3", 6)
