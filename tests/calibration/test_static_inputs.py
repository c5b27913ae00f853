"""Static inputs: scales are the range of what a layer multiplies, wherever it stands and whatever quantizes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.checkpoint import Checkpoint
from hf_lowbit.calibration.static_inputs import UNKNOWN_RANGE, InputHistogram
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.nn import PackedModule
from hf_lowbit.plan import packed_modules
from tests.matrix.models import fingerprint
from tests.plugins.outliers import one_token, outlier_llama, quantized, tiny_moe, token_batches, walk

Q, K, GATE, UP, DOWN = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
)


def config(**fields: Any) -> Any:
    return hf_lowbit.RTNConfig(**{"bits": 8, "activation_bits": 8, "activation_static": True, **fields})


def scale_of(model: nn.Module, name: str, parameter: str = "weight") -> Tensor:
    module = model.get_submodule(name)
    assert isinstance(module, PackedModule)
    scale = module.input_scale(parameter, None if parameter == "weight" else 0)
    assert scale is not None
    return scale


@torch.no_grad()
def inputs_of(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """All that a layer reads."""
    read: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in read])


@pytest.mark.parametrize("activation", [{}, {"activation_bits": 4}, {"activation_format": "float8_e4m3fn"}], ids=str)
def test_scales_cover_the_largest_input(activation: dict[str, Any]) -> None:
    """Of the calibration data as it reaches the layer through quantized ones; read alike, scaled alike."""
    model = quantized(outlier_llama(), config(**activation))
    spec = packed_modules(model)[Q].layer_spec.activation
    assert spec is not None and spec.static
    scales = {name: scale_of(model, name) for name in (Q, K, GATE, UP, DOWN)}
    assert torch.equal(scales[Q], scales[K]) and torch.equal(scales[GATE], scales[UP])
    assert packed_modules(model)[Q].weight_input_scale is not packed_modules(model)[K].weight_input_scale  # type: ignore[union-attr]
    first = [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k")]
    largest = inputs_of(outlier_llama(), first[0], token_batches()).abs().max()  # nothing before it is quantized
    for name in first:
        assert torch.equal(scale_of(model, name), (largest / spec.limit).reshape(1))
    for layer in packed_modules(model.model.layers[1]).values():  # as while it is calibrated
        del layer.weight_input_scale
    for name, scale in scales.items():
        largest = inputs_of(model, name, token_batches()).abs().max()
        torch.testing.assert_close(scale[0], largest / spec.limit)


def test_integers_multiply_and_the_report_says_which() -> None:
    report = hf_lowbit.report(quantized(outlier_llama(), config()))
    assert {(layer.activation, layer.arithmetic) for layer in report.layers} == {("int 8 bits, static", "int8")}
    plain = hf_lowbit.report(quantized(outlier_llama(), config(activation_static=False)))
    extra = {a.name: a.packed_bytes - b.packed_bytes for a, b in zip(report.layers, plain.layers, strict=True)}
    assert set(extra.values()) == {4}


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentiles(percentile: float) -> None:
    """Exact to a 128th, however the data comes in; Quamba's test 4: of 100 it is the largest."""
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) ** 3
    whole, *parts = [InputHistogram((1,), percentile < 100) for _ in range(3)]
    whole.update(x)
    for index, rows in enumerate(x.split(700)):
        parts[index % 2].update(rows)
    for mine, other in zip(parts[0].summed(), parts[1].summed(), strict=True):  # as over processes
        mine += other
    for mine, other in zip(parts[0].largest(), parts[1].largest(), strict=True):
        mine.copy_(torch.maximum(mine, other))
    limit = whole.largest_magnitude(percentile)
    assert torch.equal(limit, parts[0].largest_magnitude(percentile))
    expected = x.abs().flatten().sort().values[int(percentile / 100 * (x.numel() - 1))]
    assert expected <= limit <= expected * (1 + 1 / 64)
    if percentile == 100:
        assert limit == x.abs().max() and not whole.summed()


def test_a_percentile_clips() -> None:
    """Quamba's test 5: what is clipped loses more, what is not loses less."""
    whole, clipped = (quantized(outlier_llama(), config(activation_percentile=p)) for p in (100.0, 95.0))
    name = "model.layers.0.mlp.down_proj"
    assert scale_of(clipped, name) < 0.7 * scale_of(whole, name)


def test_experts_and_convolutions() -> None:
    model = quantized(tiny_moe(), config())
    name = "model.layers.0.mlp.experts"
    experts: Any = model.get_submodule(name)
    for parameter in experts.packed_parameters:
        stored = experts.get_parameter(f"{parameter}_input_scale").view(torch.float32)
        assert (stored == stored.flatten()[0]).all() and stored[0, 0] > 0
    largest = inputs_of(model, name, token_batches()).abs().max()
    torch.testing.assert_close(scale_of(model, name, "gate_up_proj")[0], largest / 127, rtol=0.02, atol=0)
    net = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(64, 4))
    data = [{"input": torch.randn(2, 4, 8)} for _ in range(2)]
    largest = torch.stack([batch["input"] for batch in data]).abs().max()
    packed = hf_lowbit.quantize(net, config(group_size=None, dataset=data, num_samples=4))
    assert torch.equal(scale_of(packed, "0"), (largest / 127).reshape(1))


class Idle(nn.Module):
    """Has a layer that reads zeros, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.zeros, self.unused = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        return self.used(x) + self.zeros(torch.zeros_like(x))


def test_layers_without_a_range_get_dynamic_scales_and_a_note() -> None:
    data = [{"x": torch.randn(3, 32)}] * 2
    model = hf_lowbit.quantize(Idle(), config(group_size=None, dataset=data, num_samples=6))
    specs = {name: module.layer_spec.activation for name, module in packed_modules(model).items()}
    dynamic = ActivationSpec("int", 8)
    assert specs == {"used": ActivationSpec("int", 8, static=True), "zeros": dynamic, "unused": dynamic}
    report = hf_lowbit.report(model)
    assert {layer.name: layer.activation for layer in report.layers} == {
        f"{name}.weight": str(spec) for name, spec in specs.items()
    }
    assert f"zeros.weight: {UNKNOWN_RANGE}" in report.warnings
    assert any(text.startswith("unused.weight") and "dynamic scales" in text for text in report.warnings)
    assert torch.isfinite(model.unused(torch.randn(3, 32))).all()


def test_experts_that_no_token_reaches_share_the_range_of_the_others() -> None:
    model: Any = quantized(tiny_moe(), config(), one_token())
    experts = model.model.layers[0].mlp.experts
    assert experts.has_static_inputs
    stored = experts.down_proj_input_scale.view(torch.float32)
    assert (stored == stored[0, 0]).all() and stored[0, 0] > 0


def test_tied_heads_get_dynamic_scales_and_a_note() -> None:
    model = outlier_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    result = quantized(model, config(quantize_embeddings=True))
    assert packed_modules(result)["lm_head"].layer_spec.activation == ActivationSpec("int", 8)
    assert any(
        "not calibrated, dynamic scales" in text and "lm_head" in text for text in hf_lowbit.report(result).warnings
    )


@pytest.mark.parametrize(
    "request_",
    [
        hf_lowbit.GPTQConfig(bits=4, group_size=32, activation_bits=8, activation_static=True),
        hf_lowbit.GPTQConfig(
            bits=4, group_size=32, activation_bits=8, activation_static=True, tuning=hf_lowbit.TuningConfig(epochs=1)
        ),
        hf_lowbit.QuaRotConfig(activation_bits=8, activation_static=True),
        hf_lowbit.QUIKConfig(bits=8, activation_bits=8, activation_symmetric=True, activation_static=True, outliers=8),
        hf_lowbit.OmniQuantConfig(bits=4, group_size=32, activation_bits=8, activation_static=True, epochs=1),
        config(low_rank=hf_lowbit.LowRankConfig(rank=4)),
    ],
    ids=["gptq", "tuned", "quarot: transforms", "quik: exact columns", "omniquant: learned", "low rank"],
)
def test_with_other_parts_of_a_layer_and_reloaded(request_: Any, tmp_path: Path) -> None:
    """Saved and read again the bits are the same; integers multiply; and it is near the float model."""
    model = quantized(outlier_llama(), request_)
    static = {name for name, module in packed_modules(model).items() if module.has_static_inputs}
    assert static == set(packed_modules(model))
    batch = token_batches(1, seed=3)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        exact = outlier_llama()(**batch).logits
    assert (expected - exact).norm() < 0.6 * exact.norm()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(again) == fingerprint(model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)


def test_exact_columns_are_no_part_of_the_range() -> None:
    """QUIK keeps outlier columns as floats: the codes' scale need not cover them."""
    fields = {"bits": 8, "activation_bits": 8, "activation_symmetric": True, "activation_static": True}
    model = quantized(outlier_llama(), hf_lowbit.QUIKConfig(outliers=8, **fields))
    name = "model.layers.0.self_attn.q_proj"
    assert scale_of(model, name) < 0.2 * scale_of(quantized(outlier_llama(), config()), name)


def test_it_needs_data() -> None:
    with pytest.raises(ConfigError, match="activation_static=True needs calibration data"):
        hf_lowbit.quantize(outlier_llama(), config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_bits": None}, "activation_static=True needs activation_bits or activation_format"),
        ({"activation_static": "yes"}, "activation_static must be True or False, not 'yes'"),
        ({"activation_percentile": 0}, "activation_percentile must lie above 0 and at most at 100, not 0"),
        ({"activation_percentile": True}, "activation_percentile must lie above 0"),
        ({"activation_percentile": 99, "activation_static": False}, "activation_percentile=99 needs activation_static"),
        (
            {"activation_bits": None, "activation_static": False, "activation_group_size": 4},
            "activation_group_size=4 needs",
        ),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_single_layers_by_overrides() -> None:
    overrides = {
        "down_proj": {"activation_static": False},
        "o_proj": {"activation_bits": 4, "activation_group_size": 16},
    }
    model = quantized(outlier_llama(), config(overrides=overrides))
    specs = {name.rpartition(".")[2]: str(m.layer_spec.activation) for name, m in packed_modules(model).items()}
    assert specs["q_proj"] == "int 8 bits, static" and specs["down_proj"] == "int 8 bits"
    assert specs["o_proj"] == "int 4 bits, groups of 16, static"


def test_an_adapter_trains_on_top_and_merges() -> None:
    """The base quantizes its inputs as it does without; merged codes keep the scale that was stored."""
    peft = pytest.importorskip("peft")
    model = quantized(outlier_llama(), config(group_size=32))
    batch = token_batches(1, seed=3)[0]
    stored = {key: value for key, value in fingerprint(model).items() if key.endswith("_input_scale")}
    with torch.no_grad():
        before = model(**batch).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    output = adapted(**batch, labels=batch["input_ids"])
    assert torch.equal(output.logits, before)
    output.loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
        changed = adapted(**batch).logits
    merged = adapted.merge_and_unload()
    assert {key: value for key, value in fingerprint(merged).items() if key.endswith("_input_scale")} == stored
    with torch.no_grad():
        assert (merged(**batch).logits - changed).norm() < 0.2 * (changed - before).norm() + 0.05 * before.norm()


def test_a_killed_run_resumes_with_its_scales(tmp_path: Path) -> None:
    """Finished blocks come back with the scales they had."""

    class Killed(Exception):
        pass

    def step(block: Block) -> None:
        if block.name.endswith("1") and not resumed:
            raise Killed
        for key in block.matrices:
            block.round_to_nearest(key, "by hand")

    static, resumed = config(group_size=32), False
    expected, model, again = outlier_llama(), outlier_llama(), outlier_llama()
    with pytest.raises(Killed):
        walk(model, step, config=static, checkpoint=Checkpoint(tmp_path / "run", "same", True))
    resumed = True
    walk(again, step, config=static, checkpoint=Checkpoint(tmp_path / "run", "same", True))
    walk(expected, step, config=static)
    assert fingerprint(again) == fingerprint(expected)
    assert any(name.endswith("_input_scale") for name in fingerprint(again))
