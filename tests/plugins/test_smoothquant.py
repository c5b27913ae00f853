"""SmoothQuant: the numbered tests of its method page, on a tiny Llama with outlier channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_lowbit
from hf_lowbit import SmoothQuantConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.scaling import smooth
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import decode
from hf_lowbit.formats.packed import scales
from tests.plugins.outliers import logit_error, outlier_llama, outputs_of, quantized, relative, walk

CONSUMERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


# 1, 2
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ranges_are_balanced_and_the_output_stays(alpha: float) -> None:
    """Up to the 0.4 % by which a scale moves to where a norm can be stored."""
    checked = []

    def step(block: Block) -> None:
        before = outputs_of(block)
        assert [site.previous for site in smooth(block, alpha)] == list(CONSUMERS)
        assert relative(outputs_of(block), before) < 1e-5
        magnitudes = block.magnitudes()
        for names in CONSUMERS.values():
            inputs = magnitudes[f"{names[0]}.weight"].maximum
            weights = [block.module.get_submodule(name).weight.abs().amax(0) for name in names]
            weight = torch.stack(weights).amax(0)
            expected = {0.0: (None, torch.ones(64)), 0.5: (weight, inputs), 1.0: (torch.ones(64), None)}[alpha]
            for value, wanted in zip((inputs, weight), expected, strict=True):
                if wanted is not None:
                    torch.testing.assert_close(value, wanted, rtol=0.01, atol=0)
                    checked.append(names)

    walk(outlier_llama(), step)
    assert len(checked) == (8 if alpha == 0.5 else 4)


# 3
@torch.no_grad()
def test_outliers_cost_a_tenth_in_the_layers_that_read_them() -> None:
    """W8A8 with weights as they are and weights that were smoothed, each layer's error on the float model's inputs."""

    def one_outlier() -> Any:
        model = outlier_llama()
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data.uniform_(0.5, 1.5)[11] = 100.0
        return model

    reference = one_outlier()
    models = [
        quantized(one_outlier(), config)
        for config in (SmoothQuantConfig(), hf_lowbit.RTNConfig(bits=8, activation_bits=8, group_size=None))
    ]
    hidden = torch.randn(512, 64, generator=torch.Generator().manual_seed(5))
    for norm, names in CONSUMERS.items():
        errors = []
        for model in models:
            layer, exact = model.model.layers[0], reference.model.layers[0]
            x = layer.get_submodule(norm)(hidden)
            right = [exact.get_submodule(name)(exact.get_submodule(norm)(hidden)) for name in names]
            new = [layer.get_submodule(name)(x) for name in names]
            errors.append(sum(float((a - b).square().sum()) for a, b in zip(new, right, strict=True)))
        assert errors[0] < 0.1 * errors[1]
    smoothed, plain = (logit_error(model, reference) for model in models)
    assert smoothed < 0.5 * plain


# 6
def test_only_norms_and_their_readers_change() -> None:
    def step(block: Block) -> None:
        before = copy.deepcopy(block.module.state_dict())
        smooth(block, 0.5)
        changed = {name for name, value in block.module.state_dict().items() if not torch.equal(value, before[name])}
        layers = {*CONSUMERS, *(name for names in CONSUMERS.values() for name in names)}
        assert changed == {f"{name}.weight" for name in layers}

    walk(outlier_llama(), step)


def test_both_operands_are_integers() -> None:
    """The report says int8, and every layer's product is that of its integers."""
    report = hf_lowbit.report(quantized(outlier_llama(), SmoothQuantConfig()))
    assert {layer.arithmetic for layer in report.layers} == {"int8"}
    assert {(layer.bits, layer.activation, layer.group_size) for layer in report.layers} == {(8, "int 8 bits", None)}


# 4, 5
@pytest.mark.parametrize("fields", [{}, {"activation_static": True}], ids=["O1", "O3"])
def test_levels_of_the_paper_compute_what_their_codes_say(fields: dict[str, Any]) -> None:
    """One scale per tensor, inputs per token or by the stored scale: integer sums, codes within -127..127."""
    model = quantized(outlier_llama(), SmoothQuantConfig(group_size="tensor", **fields))
    layer: Any = model.model.layers[0].mlp.gate_proj
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)) * 3
    largest = x.abs().amax(-1, keepdim=True)
    scale = layer.input_scale().reshape(1, 1) if fields else largest / 127
    codes = (x / scale).round().clamp(-127, 127)
    if fields:
        assert (x / scale).abs().max() > 127.5, "nothing is clipped"
    stored = layer.packed()
    assert stored.scale.shape == (1, 1)
    weights = (decode(stored) / scales(stored)).round()
    expected = (codes.double() @ weights.double().t()) * scale.double() * scales(stored).double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_smoothing_makes_stored_scales_usable() -> None:
    """One scale for all channels: outliers leave little of it to the others, unless weights take them over."""
    reference = outlier_llama()
    smoothed = quantized(outlier_llama(), SmoothQuantConfig(activation_static=True))
    plain = quantized(
        outlier_llama(), hf_lowbit.RTNConfig(bits=8, activation_bits=8, group_size=None, activation_static=True)
    )
    report = hf_lowbit.report(smoothed)
    assert {(layer.activation, layer.arithmetic) for layer in report.layers} == {("int 8 bits, static", "int8")}
    assert logit_error(smoothed, reference) < 0.5 * logit_error(plain, reference)


def test_what_bfloat16_models_store_is_smoothed_as_well(tmp_path: Path) -> None:
    """Norms are rounded after the codes were chosen; read again as float32, such models lose no more than others."""
    quantized(outlier_llama().bfloat16(), SmoothQuantConfig()).save_pretrained(tmp_path)
    stored = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reference = outlier_llama().bfloat16().float()
    exact = logit_error(quantized(copy.deepcopy(reference), SmoothQuantConfig()), reference)
    assert logit_error(stored, reference) < 1.2 * exact


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -0.1}, "alpha must lie between 0 and 1, not -0.1"),
        ({"alpha": 1.1}, "alpha must lie between 0 and 1, not 1.1"),
        ({"alpha": True}, "alpha must lie between 0 and 1, not True"),
        ({"alpha": "0.5"}, "alpha must lie between 0 and 1, not '0.5'"),
        ({"alpha": float("nan")}, "alpha must lie between 0 and 1, not nan"),
        ({"activation_bits": None}, "activation_bits must be set"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"SmoothQuantConfig: {message}"):
        SmoothQuantConfig(**values)
