"""End-to-end tuning: gradients of scales are right, losses fall, codes stay, and a failure changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.calibration.predictions import Predictions
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.calibration.tuned_scales import TunedScales
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.formats.packed import scales
from hf_lowbit.nn import LayerSpec, PackedLinear
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import round_to_nearest
from tests.matrix.models import MODELS

SPECS = [
    WeightSpec(bits=3, group_size=16, scale_dtype="float32"),
    WeightSpec(bits=3, symmetric=False, scale_dtype="float32"),
    WeightSpec("nf", 4, "tensor", scale_dtype="float32"),
]


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def data() -> Tensor:
    return torch.randint(96, (12, 24), generator=torch.Generator().manual_seed(1))


def config(**fields: Any) -> Any:
    fields = {"bits": 2, "tuning": hf_lowbit.TuningConfig(epochs=3, learning_rate=0.01), **fields}
    return hf_lowbit.GPTQConfig(group_size=16, dataset=data(), num_samples=12, sequence_length=24, **fields)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.format}-{spec.group_size}")
def test_gradients_of_scales_are_those_of_the_dequantized_weight(spec: WeightSpec) -> None:
    torch.manual_seed(0)
    layer = PackedLinear.from_float(nn.Linear(32, 8, bias=False), LayerSpec(spec))
    layer.set_packed("weight", round_to_nearest(layer.weight.detach(), spec))
    holder = nn.ModuleList([layer])
    x, direction = torch.randn(5, 32), torch.randn(5, 8)
    tuned = TunedScales(holder)
    (log,) = tuned.logs
    with tuned.applied():
        (layer(x) * direction).sum().backward()
    expected = torch.zeros_like(log, requires_grad=True)
    weight = layer.dequantized().reshape(*log.shape, -1) * expected.exp().unsqueeze(-1)
    (F.linear(x, weight.reshape(8, 32)) * direction).sum().backward()
    assert expected.grad is not None and expected.grad.abs().min() > 0
    torch.testing.assert_close(log.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert "coded_product" not in vars(layer)


def test_tuned_scales_compute_what_they_store() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(WeightSpec(bits=4, group_size=16), ActivationSpec("int", 8))
    layer = PackedLinear.from_float(nn.Linear(32, 8), spec)
    layer.set_packed("weight", round_to_nearest(layer.weight.detach(), spec.weight))
    tuned, x = TunedScales(nn.ModuleList([layer])), torch.randn(6, 32)
    with torch.no_grad():
        tuned.logs[0].uniform_(-0.3, 0.3)
        with tuned.applied():
            simulated = layer(x)
        before = layer(x)
        tuned.store()
        torch.testing.assert_close(layer(x), simulated, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, simulated, rtol=1e-3)


def test_the_loss_is_the_divergence_of_what_the_mask_leaves() -> None:
    """Against torch's own, with its gradient."""
    model, other = llama(), llama(1)
    mask = torch.ones_like(data())
    mask[:, -5:] = 0
    batch = {"input_ids": data(), "attention_mask": mask}
    with TensorStore() as store:
        predictions = Predictions(model, [batch], store)
        (piece,) = predictions.pieces(12)
        loss = predictions.loss(other, piece)
    with torch.no_grad():
        expected = model(**batch).logits.log_softmax(-1)
    logits = other(**batch).logits
    by_hand = F.kl_div(logits.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)
    by_hand = by_hand[mask.bool()].mean()
    torch.testing.assert_close(loss, by_hand)
    weight = other.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(each, weight)[0] for each in (loss, by_hand)))


def test_the_losses_of_single_samples_add_up() -> None:
    """Also where the mask leaves one sample fewer tokens than another."""
    model, other = llama(), llama(1)
    mask = torch.ones_like(data())
    mask[0, -5:] = mask[1, -9:] = 0
    with TensorStore() as store:
        predictions = Predictions(model, [{"input_ids": data(), "attention_mask": mask}], store)
        (piece,) = predictions.pieces(len(mask))
        parts = predictions.parts(piece)
        assert len(parts) == len(mask) and len({share for _, share in parts}) == 3
        total = sum(predictions.loss(other, part) * share for part, share in parts)
        torch.testing.assert_close(total, predictions.loss(other, piece))


def test_it_comes_closer_to_the_float_model_and_keeps_the_codes() -> None:
    model = llama()
    plain = hf_lowbit.quantize(copy.deepcopy(model), config(tuning=None))
    tuned = hf_lowbit.quantize(copy.deepcopy(model), config())
    with TensorStore() as store:
        predictions = Predictions(model, [{"input_ids": data()}], store)
        (piece,) = predictions.pieces(12)
        with torch.no_grad():
            losses = [float(predictions.loss(one, piece)) for one in (model, plain, tuned)]
    assert losses[0] < 1e-6 and losses[2] < 0.8 * losses[1]
    for name, layer in packed_modules(plain).items():
        other = tuned.get_submodule(name)
        assert torch.equal(layer.weight, other.weight)
        assert not torch.equal(scales(layer.packed()), scales(other.packed()))
    assert not torch.equal(tuned.model.norm.weight, model.model.norm.weight)
    assert any("tuned end to end" in line for line in hf_lowbit.report(tuned).warnings)


def test_it_saves_and_reloads(tmp_path: Path) -> None:
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config(), dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert again.config.quantization_config.tuning == hf_lowbit.TuningConfig(epochs=3, learning_rate=0.01)
    with torch.no_grad():
        assert torch.equal(model(data()).logits, again(data()).logits)


def test_it_is_repeatable() -> None:
    first, second = (hf_lowbit.quantize(llama(), config()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_rate_that_does_harm_is_undone() -> None:
    given = config(bits=8, tuning=hf_lowbit.TuningConfig(epochs=1, learning_rate=0.9))
    harmed = hf_lowbit.quantize(llama(), given)
    plain = hf_lowbit.quantize(llama(), config(bits=8, tuning=None))
    assert any("was undone" in line for line in hf_lowbit.report(harmed).warnings)
    with torch.no_grad():
        assert torch.equal(harmed(data()).logits, plain(data()).logits)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "mamba", "whisper", "unet"])
def test_other_architectures(name: str) -> None:
    tiny = MODELS[name]
    inputs = {key: torch.atleast_1d(torch.as_tensor(value)) for key, value in tiny.inputs(torch.float32).items()}
    model = tiny.build().eval()
    fields = {"tuning": hf_lowbit.TuningConfig(epochs=6, learning_rate=0.005, samples=1), "group_size": 8}
    asked = hf_lowbit.GPTQConfig(bits=3, dataset=[inputs] * 2, num_samples=2, **fields)
    quantized = hf_lowbit.quantize(model, asked)
    (line,) = (line for line in hf_lowbit.report(quantized).warnings if "loss on a part" in line)
    assert "tuned end to end" in line
    assert not any(p.grad is not None for p in quantized.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tuning": {"epochs": 0}}, "tuning.epochs"),
        ({"tuning": {"rate": 1}}, "no field tuning.rate"),
        ({"tuning": {"learning_rate": 2}}, "tuning.learning_rate"),
        ({"tuning": 3}, "must be a TuningConfig"),
        ({"low_rank": {"rank": 2, "keep": "adapter"}}, "without its adapter"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_a_method_that_does_not_calibrate() -> None:
    with pytest.raises(ConfigError, match="needs a method that calibrates"):
        hf_lowbit.quantize(llama(), hf_lowbit.RTNConfig(tuning=hf_lowbit.TuningConfig()))
