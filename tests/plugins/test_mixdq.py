"""MixDQ: the first token apart where it is a constant, shortcuts in parts, static inputs with data and none without."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.first_token import constant_first_token, find_text_layers
from hf_lowbit.nn import PackedLinear
from hf_lowbit.plan import packed_modules
from hf_lowbit.search.pipeline.inputs import input_ranges, quantized_inputs
from hf_lowbit.testbed.outlier_token import outlier_size, with_outlier, with_wider_text
from hf_lowbit_mixdq import MixDQConfig
from tests.plugins.denoisers import calls_of, float_denoiser, pipeline_of, signal_to_noise

UNET = "sd-fashion"
TEXT_ALONE = [r"(?!.*attn2\.to_[kv]$).*"]  # all other layers stay float


def decibels(expected: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


@cache
def wider() -> tuple[Any, list[dict[str, Tensor]]]:
    """A denoiser that computes what the trained one does, and calls whose first token is an outlier."""
    calls = calls_of(UNET)
    model = with_wider_text(float_denoiser(UNET), calls[0])
    size = outlier_size(calls[0]["encoder_hidden_states"])
    return model, [{**c, "encoder_hidden_states": with_outlier(c["encoder_hidden_states"], size)} for c in calls]


def quantized(model: nn.Module, data: list[dict[str, Tensor]], **fields: Any) -> Any:
    config = MixDQConfig(num_samples=sum(len(batch["timestep"]) for batch in data), **fields)
    return hf_lowbit.quantize(copy.deepcopy(model), config, data=data)


@cache
def ordinary() -> Any:
    """The trained denoiser in W8A8; nobody changes it."""
    return quantized(float_denoiser(UNET), calls_of(UNET)[:1])


@torch.no_grad()
def test_w8a8_of_the_trained_denoiser() -> None:
    model = ordinary()
    assert signal_to_noise(UNET, model) > 18  # inputs of conv_in alone leave 24 dB
    modules = packed_modules(model)
    apart = {name for name, module in modules.items() if module.layer_spec.constant_token}
    assert apart == {name for name in modules if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert all(m.layer_spec.activation.static and not m.layer_spec.activation.symmetric for m in modules.values())
    assert any("14 layers that read the text store the product" in line for line in hf_lowbit.report(model).warnings)


def test_shortcuts_are_split_in_groups_that_no_two_parts_share() -> None:
    parts = find_concatenations(float_denoiser(UNET), calls_of(UNET)[0])
    modules = packed_modules(ordinary())
    split = {name for name, module in modules.items() if isinstance(module.layer_spec.weight.group_size, int)}
    assert split == set(parts) == {name for name in modules if "up_blocks" in name and name.endswith("conv_shortcut")}
    rest = [r"(?!.*conv_shortcut).*"]
    model = quantized(float_denoiser(UNET), calls_of(UNET)[:1], split_shortcuts=False, modules_to_not_convert=rest)
    whole = packed_modules(model)
    assert all(module.layer_spec.weight.group_size is None for module in whole.values())


@torch.no_grad()
def test_an_outlier_token_costs_nothing_where_it_is_apart() -> None:
    """The specification's test 3, on a copy that computes the same with an outlier of 55 times the others."""
    model, calls = wider()
    plain = float_denoiser(UNET)
    assert decibels(plain(**calls_of(UNET)[0])[0], model(**calls[0])[0]) > 90
    aware, unaware = (
        quantized(model, calls, bos_aware=value, modules_to_not_convert=TEXT_ALONE) for value in (True, False)
    )
    name = find_text_layers(model, calls[0])[0]
    text = calls[0]["encoder_hidden_states"]
    layers = [one.get_submodule(name) for one in (model, aware, unaware)]
    expected, with_it, without = (layer(text) for layer in layers)
    torch.testing.assert_close(with_it[:, 0], expected[:, 0], rtol=1e-5, atol=1e-6)
    gain = decibels(expected[:, 1:], with_it[:, 1:]) - decibels(expected[:, 1:], without[:, 1:])
    assert gain > 25
    outputs = [one(**calls[0])[0] for one in (model, aware, unaware)]
    assert decibels(outputs[0], outputs[1]) > decibels(outputs[0], outputs[2]) + 3


@torch.no_grad()
def test_keys_and_values_are_the_worst_inputs_without_it_and_ordinary_with_it() -> None:
    """The specification's test 4: each layer's inputs alone at 8 bits, by the error of its own output."""
    model, calls = wider()
    text_layers = find_text_layers(model, calls[0])
    others = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in text_layers
    ]
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name in (*text_layers, *others)
    ]
    model(**calls[0])
    for handle in handles:
        handle.remove()

    def errors(constant: list[str]) -> dict[str, float]:
        ranges = input_ranges(model, inputs, calls[:1], {}, constant)
        found = {}
        for name, x in inputs.items():
            layer = model.get_submodule(name)
            expected = layer(x)
            with quantized_inputs(model, {name: 8}, ranges):
                changed = layer(x)
            first = 1 if name in text_layers else 0  # the outlier itself is large, and exact in any case
            found[name] = decibels(expected[:, first:], changed[:, first:])
        return found

    without, apart = errors([]), errors(text_layers)
    assert max(without[name] for name in text_layers) < min(without[name] for name in others)
    assert min(apart[name] for name in text_layers) > min(apart[name] for name in others) - 1
    assert min(apart[name] - without[name] for name in text_layers) > 20


@torch.no_grad()
@pytest.mark.parametrize("change", ["zeroed", "differing", "all zero"])
def test_the_first_token_is_looked_at_on_the_data(change: str) -> None:
    calls = [dict(batch) for batch in calls_of(UNET)[:1]]
    text = calls[0]["encoder_hidden_states"].clone()
    text[0 if change == "zeroed" else slice(None), 0] = 0
    if change == "differing":
        text[:, 0] = torch.randn(len(text), text.shape[-1])
    calls[0]["encoder_hidden_states"] = text
    token = constant_first_token(calls)
    if change == "zeroed":  # negatives of zeros say nothing, and are multiplied in full precision
        assert isinstance(token, Tensor) and torch.equal(token, text[-1, 0])
        return
    assert isinstance(token, str)
    model = quantized(float_denoiser(UNET), calls, modules_to_not_convert=TEXT_ALONE)
    assert not any(module.layer_spec.constant_token for module in packed_modules(model).values())
    assert any(token in line and "bos_aware" in line for line in hf_lowbit.report(model).warnings)


def test_from_pretrained_alone_applies_bits_per_layer(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    overrides = {"attn2": {"bits": 2, "activation_bits": 4}, "conv_in": {"bits": 8, "activation_bits": None}}
    config = MixDQConfig(bits=4, overrides=overrides)
    folder = Path(pipeline_of(UNET).config._name_or_path) / "unet"
    model = UNet2DConditionModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)
    modules = packed_modules(model)
    spec = modules["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"].layer_spec
    assert spec.weight.bits == 2 and spec.activation is not None and spec.activation.bits == 4
    assert modules["conv_in"].layer_spec.activation is None and modules["conv_out"].layer_spec.weight.bits == 4
    assert not any(m.layer_spec.activation.static for m in modules.values() if m.layer_spec.activation)
    assert signal_to_noise(UNET, model) > 3


@torch.no_grad()
def test_saved_and_loaded_it_draws_the_same(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    model = ordinary()
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    batch = calls_of(UNET)[1]
    assert torch.equal(model(**batch)[0], again(**batch)[0])


@torch.no_grad()
def test_prompts_of_a_pipeline_make_inputs_static() -> None:
    pipeline = copy.deepcopy(pipeline_of(UNET))
    prompts = ["a photo of a bag", "a photo of a coat"]
    config = MixDQConfig(num_samples=2, modules_to_not_convert=TEXT_ALONE)
    hf_lowbit.quantize(pipeline, config, prompts=prompts, steps=2, height=32, width=32)
    modules = packed_modules(pipeline.unet)
    assert all(module.layer_spec.activation.static for module in modules.values())
    assert any(module.layer_spec.constant_token for module in modules.values())


@torch.no_grad()
def test_a_dead_channel_ruins_no_other() -> None:
    """The specification's pitfall: scales are bounded each by itself."""
    model = float_denoiser(UNET)
    model.conv_out.weight[1] = 0
    batch = calls_of(UNET)[0]
    found = quantized(model, [batch], modules_to_not_convert=["(?!conv_out$).*"])(**batch)[0]
    expected = model(**batch)[0]
    assert decibels(expected, found) > 20 and torch.allclose(found[:, 1], expected[:, 1])


@torch.no_grad()
def test_a_merged_adapter_leaves_no_stale_product() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    calls = calls_of(UNET)[:1]
    model = quantized(float_denoiser(UNET), calls, modules_to_not_convert=TEXT_ALONE)
    name = next(name for name, module in packed_modules(model).items() if module.layer_spec.constant_token)
    config = LoraConfig(r=4, target_modules=f"{name.replace('.', chr(92) + '.')}", init_lora_weights=False)
    inject_adapter_in_model(config, model)
    layer, text = model.get_submodule(name), calls[0]["encoder_hidden_states"]
    assert isinstance(layer.base_layer, PackedLinear)
    base, adapted = layer.base_layer(text).clone(), layer(text)
    assert (adapted[:, 0] - base[:, 0]).abs().max() > 1e-3
    layer.merge()
    torch.testing.assert_close(layer(text)[:, 0], adapted[:, 0], rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer.base_layer(text), base)


def test_a_denoiser_without_text_says_so() -> None:
    calls = calls_of("dit-fashion")[:1]
    model = quantized(float_denoiser("dit-fashion"), calls, modules_to_not_convert=["(?!.*ff).*"])
    assert any("no layer reads the tokens of a text" in line for line in hf_lowbit.report(model).warnings)


def test_what_is_refused() -> None:
    with pytest.raises(hf_lowbit.ConfigError, match="bos_aware must be True or False"):
        MixDQConfig(bos_aware=1)  # type: ignore[arg-type]
    weights = MixDQConfig(bits=4, activation_bits=None)
    assert weights.layer_spec("x").activation is None and not weights.copy_with_data([1]).activation_static
    assert MixDQConfig().copy_with_data([1]).activation_static and not MixDQConfig().activation_static
