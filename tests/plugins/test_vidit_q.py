"""ViDiT-Q: what its method page promises of tokens and channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_lowbit
from hf_lowbit import RTNConfig, ViDiTQConfig
from hf_lowbit.calibration.statistics import MeanPeak
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens
from hf_lowbit.nn import Scaling
from hf_lowbit.nn.transforms import Hadamard, ScaledHadamard
from hf_lowbit.plan import packed_modules
from hf_lowbit.transforms.scales import smoothing_scale
from tests.matrix.conftest import data_of
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import outlier_llama
from tests.plugins.outliers import quantized as quantized_on_tokens

TOKENS = ActivationSpec("int", 8, symmetric=False)
DIT = MODELS["dit"]


def dit() -> Any:
    """With a heavy channel behind every modulated norm, by the modulation's shift, and one in the feed-forward."""
    torch.manual_seed(0)
    model = DIT.build().eval()
    for block in model.transformer_blocks:
        shift = block.norm1.linear.bias.data.view(6, -1)
        shift[0, 5], shift[3, 9] = 50.0, -50.0
        block.ff.net[0].proj.bias.data[17] = 50.0
    return model


def batches(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.full((2,), timestep),
            "class_labels": torch.randint(10, (2,), generator=generator),
        }
        for timestep in (800, 300)
    ]


def quantized(config: Any) -> Any:
    config.num_samples = 4
    return hf_lowbit.quantize(dit(), config, data=batches(0))


@torch.no_grad()
def error(model: Any) -> float:
    """Squared error beside the square, on data that nothing was calibrated on."""
    reference = dit()
    pairs = [(model(**batch).sample, reference(**batch).sample) for batch in batches(1)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


# 1
def test_balancing_is_an_identity() -> None:
    model, reference = quantized(ViDiTQConfig(bits=8, balance=True)), dit()
    layer = packed_modules(model)["transformer_blocks.0.attn1.to_q"]
    assert layer.layer_spec.transform == Scaling()
    exact = reference.transformer_blocks[0].attn1.to_q
    matrix, x = layer.to_matrix("weight", exact.weight.detach()), 10 * torch.randn(20, 32)
    torch.testing.assert_close(layer.transformed(x) @ matrix.t(), x @ exact.weight.t(), rtol=1e-4, atol=1e-4)


# 2
def test_tokens_are_never_clipped() -> None:
    x = torch.randn(50, 48) * torch.logspace(-3, 3, 50)[:, None] + torch.linspace(-5, 5, 50)[:, None]
    read = quantize_tokens(x, TOKENS)
    assert bool(((restore_tokens(*read) - x).abs() <= 0.5001 * read.scale).all())
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    torch.testing.assert_close(read.scale.squeeze(-1), (high - low) / 255)


# 3
@pytest.mark.parametrize("seed", range(4))
def test_tokens_lose_less_than_the_whole_tensor(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(30, 32) * torch.rand(30, 1).exp()
    whole = quantize_tokens(x, ActivationSpec("int", 8, symmetric=False, static=True))
    errors = [(restore_tokens(*codes) - x).square().sum() for codes in (quantize_tokens(x, TOKENS), whole)]
    assert errors[0] < errors[1]


# pitfall
def test_a_token_of_zeros_disturbs_no_other() -> None:
    """The authors' guard resets the scales of all tokens where one is below 1e-6, and everything clips."""
    layer = packed_modules(quantized(ViDiTQConfig()))["transformer_blocks.0.attn1.to_q"]
    x = torch.randn(1, 6, 32)
    padded = torch.cat([x, torch.zeros(1, 3, 32)], 1)
    with torch.no_grad():
        assert torch.equal(layer(padded)[:, :6], layer(x))
        torch.testing.assert_close(layer(padded)[:, 6:], layer.bias.expand(1, 3, 32))


# 5, 6
def test_balancing_helps_where_channels_are_heavy() -> None:
    w8, w4, plain = (
        error(quantized(config))
        for config in (ViDiTQConfig(), ViDiTQConfig(bits=4), ViDiTQConfig(bits=4, balance=False))
    )
    static = error(quantized(RTNConfig(bits=8, symmetric=False, activation_bits=8, activation_static=True)))
    assert w8 < 0.1 * w4 and w4 < plain and w8 < static, (w8, w4, plain, static)


# 6
@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_a_heavy_channel_is_balanced(alpha: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 64), torch.randn(48, 64)
    x[:, 7] *= 50
    scale = smoothing_scale(x.abs().amax(0), weight.abs().amax(0), alpha)

    def signal_to_noise(x: Tensor, weight: Tensor) -> float:
        expected = x @ weight.t()
        noise = restore_tokens(*quantize_tokens(x, TOKENS)) @ weight.t() - expected
        return float(10 * torch.log10(expected.square().sum() / noise.square().sum()))

    assert signal_to_noise(x / scale, weight * scale) > signal_to_noise(x, weight) + 3


def test_the_scale_is_the_papers() -> None:
    """A^alpha / max|W|^(1 - alpha), over all weights that read the input, A the mean over batches of the peaks."""
    seen = []
    reference = dit()
    layer = reference.transformer_blocks[0].attn1
    handle = layer.to_q.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1).abs().amax(0)))
    with torch.no_grad():
        for batch in batches(0):
            reference(**batch)
    handle.remove()
    weight = torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight]).detach().abs().amax(0)
    expected = torch.stack(seen).mean(0) ** 0.3 / weight**0.7
    for name in ("to_q", "to_k", "to_v"):
        packed = packed_modules(quantized(ViDiTQConfig(bits=4)))[f"transformer_blocks.0.attn1.{name}"]
        stored = packed.transform_tensors()["scale"].view(torch.bfloat16).float()
        torch.testing.assert_close(stored, expected, rtol=0.01, atol=0)


def test_peaks_are_averaged_over_batches() -> None:
    peak = MeanPeak(2)
    for x in ([[1.0, -2.0], [3.0, 0.0]], [[-5.0, 1.0]]):
        peak.update(torch.tensor(x))
    peak.update(torch.zeros(0, 2))
    assert peak.maximum.tolist() == [4.0, 1.5] and peak.tokens == 3


def test_what_is_balanced_and_what_stays_float() -> None:
    model = quantized(ViDiTQConfig(bits=4))
    report, layers = hf_lowbit.report(model), packed_modules(model)
    assert {"pos_embed.proj", "proj_out_1", "proj_out_2"} <= set(report.skipped)
    assert not any("embedder" in name for name in layers)
    names = [f"transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")]
    folded = "transformer_blocks.0.attn1.to_out.0"  # into the values before it
    assert {name: layers[name].layer_spec.transform for name in names} == {
        name: None if name == folded else Scaling() for name in names
    }
    assert all(module.layer_spec.transform is None for module in packed_modules(quantized(ViDiTQConfig())).values())
    assert set(packed_modules(quantized(ViDiTQConfig(modules_to_not_convert=[])))) > set(layers)


def test_a_rotation_follows() -> None:
    layers = packed_modules(quantized(ViDiTQConfig(bits=4, rotate=True)))
    assert layers["transformer_blocks.0.attn1.to_q"].layer_spec.transform == ScaledHadamard(32)
    assert layers["transformer_blocks.0.attn1.to_out.0"].layer_spec.transform == Hadamard(32)
    exact, x = dit().transformer_blocks[0].attn1.to_q, torch.randn(1, 50, 32)
    x[..., 5] += 50
    errors = []
    for rotate in (True, False):
        model = quantized(ViDiTQConfig(activation_bits=4, rotate=rotate))
        with torch.no_grad():
            errors.append((packed_modules(model)["transformer_blocks.0.attn1.to_q"](x) - exact(x)).norm())
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("rotate", [False, True])
def test_it_reloads(rotate: bool, tmp_path: Path) -> None:
    config = ViDiTQConfig(bits=4, rotate=rotate, num_samples=4)
    dit().save_pretrained(tmp_path / "float")
    model = hf_lowbit.quantize(DIT.load(tmp_path / "float"), config, data=batches(0))
    model.save_pretrained(tmp_path / "packed")
    reloaded = DIT.load(tmp_path / "packed")
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(DIT.run(reloaded), DIT.run(model))


def test_norms_that_can_take_the_scale_do() -> None:
    model = quantized_on_tokens(outlier_llama(), ViDiTQConfig(bits=4))
    transforms = {name.rpartition(".")[2]: m.layer_spec.transform for name, m in packed_modules(model).items()}
    assert set(transforms.values()) == {None}


def test_convolutions_are_noted() -> None:
    tiny = MODELS["text_unet"]
    torch.manual_seed(0)
    model = hf_lowbit.quantize(tiny.build().eval(), ViDiTQConfig(bits=4, num_samples=2), data=data_of(tiny))
    kinds = [module.kind for module in packed_modules(model).values()]
    assert sum("'conv2d' are not balanced" in w for w in hf_lowbit.report(model).warnings) == kinds.count("conv2d") > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie between 0 and 1, not 1.5"),
        ({"alpha": True}, "alpha must lie between 0 and 1, not True"),
        ({"balance": 1}, "balance must be True, False or None, not 1"),
        ({"rotate": None}, "rotate must be True or False, not None"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"ViDiTQConfig: {message}"):
        ViDiTQConfig(**values)


def test_inputs_must_be_quantized() -> None:
    with pytest.raises(ConfigError, match="activation_bits must be set"):
        ViDiTQConfig(activation_bits=None, activation_symmetric=True)
    config = ViDiTQConfig(bits=4, alpha=0.11, rotate=True)
    assert ViDiTQConfig.from_dict(config.to_dict()) == copy.deepcopy(config)
