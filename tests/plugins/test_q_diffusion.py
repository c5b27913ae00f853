"""Q-Diffusion: what its method page promises of skip connections and inputs; learned rounding is in test_adaround."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
import hf_lowbit.calibration.adaptive
from hf_lowbit import QDiffusionConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import reconstruct
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.formats.packed import scales
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding.learned import AdaptiveRounding
from tests.matrix.conftest import data_of
from tests.matrix.models import MODELS, fingerprint

SKIP = 50.0  # standard deviations of what the encoder hands over, beside 1


class Decoder(nn.Module):
    """A shortcut that reads a skip connection; the first half of its outputs reads the part from below alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(48, 16, 1, bias=False)
        self.after = nn.Conv2d(16, 16, 1, bias=False)
        self.shortcut.weight.data[:8, 32:] = 0
        self.gain = nn.Parameter(torch.ones(1))  # of layers before: what no parameter had a part in is not split

    def forward(self, sample: Tensor, skip: Tensor, timestep: Tensor) -> Tensor:
        size = self.gain * (1 + timestep.view(-1, 1, 1, 1) / 500)  # inputs drift along the trajectory
        return self.after(self.shortcut(torch.cat([sample * size, skip * size], 1)))


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    """Four samples of each of three timesteps; channels of a part go together, as those of trained models do."""
    generator, mixing = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    below, skip = (torch.randn(channels, 6, generator=mixing) / 6**0.5 for channels in (32, 16))

    def part(mix: Tensor) -> Tensor:
        return torch.einsum("cf,bfhw->bchw", mix, torch.randn(4, 6, 8, 8, generator=generator))

    return [
        {"sample": part(below), "skip": SKIP * part(skip), "timestep": torch.full((4,), float(timestep))}
        for timestep in (900, 500, 100)
    ]


def decoder(**values: Any) -> tuple[Decoder, Decoder]:
    """Float and quantized."""
    torch.manual_seed(0)
    model = Decoder().eval()
    config = QDiffusionConfig(**{"bits": 8, "iterations": 0, "num_samples": 12, **values})
    return model, hf_lowbit.quantize(copy.deepcopy(model), config, data=batches())


@torch.no_grad()
def signal_to_noise(model: Decoder, quantized: Decoder) -> float:
    """Of the shortcut's outputs that read the part from below alone, in dB."""
    signal = noise = 0.0
    for batch in batches(seed=1):
        size = 1 + batch["timestep"].view(-1, 1, 1, 1) / 500
        x = torch.cat([batch["sample"] * size, batch["skip"] * size], 1)
        expected = model.shortcut(x)[:, :8]
        signal += float(expected.square().sum())
        noise += float((quantized.shortcut(x)[:, :8] - expected).square().sum())
    return 10 * math.log10(signal / noise)


# 2
@pytest.mark.parametrize("search_inputs", [True, False])
def test_a_skip_connection_erases_the_other_half_unless_it_is_split(search_inputs: bool) -> None:
    split = signal_to_noise(*decoder(search_inputs=search_inputs))
    assert signal_to_noise(*decoder(split=False, search_inputs=search_inputs)) < 10 < 34 < split < 46


# 1
def test_parts_of_equal_scales_are_no_split() -> None:
    """Of weights: tests/rounding/test_parts.py."""
    x, scale, shift = 3 * torch.randn(20, 48), torch.tensor([0.02]), torch.tensor([0.3])
    spec = {"symmetric": False, "static": True}
    whole = quantize_tokens(x, ActivationSpec(**spec), scale, shift)
    parts = quantize_tokens(x, ActivationSpec(**spec, group_size=16), scale.expand(3), shift.expand(3))
    assert torch.equal(whole.codes, parts.codes)


def test_what_is_stored_of_a_split_layer() -> None:
    _, model = decoder()
    layer, after = model.shortcut, model.after
    assert (layer.layer_spec.weight.group_size, layer.layer_spec.activation.group_size) == (16, 16)
    assert after.layer_spec.weight.group_size is None and after.layer_spec.activation.group_size is None
    scale = scales(layer.packed())
    assert torch.equal(scale[:, 0], scale[:, 1]), "one part, two groups"
    inputs = layer.input_scale()
    assert inputs.shape[-1] == 3 and bool((inputs[..., 2] > 30 * inputs[..., 0]).all())
    assert any("scales for each part of a concatenated input: shortcut" in w for w in hf_lowbit.report(model).warnings)


# 3
def test_ranges_contain_what_every_timestep_showed() -> None:
    _, model = decoder(search_inputs=False, split=False)
    layer = model.shortcut
    scale, shift = layer.input_table()
    low, high = float(shift - 128 * scale), float(shift + 127 * scale)
    largest, smallest = -math.inf, math.inf
    for batch in batches():
        size = 1 + batch["timestep"].view(-1, 1, 1, 1) / 500
        x = torch.cat([batch["sample"] * size, batch["skip"] * size], 1)
        largest, smallest = max(largest, float(x.max())), min(smallest, float(x.min()))
    assert low - 0.51 * scale <= smallest and largest <= high + 0.51 * scale
    assert high - low < 1.05 * (largest - smallest)


def test_both_parts_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' code trains the first half alone where a layer is a block by itself."""
    moved = {}

    def spy(block: Block, learned: dict[str, AdaptiveRounding], training: Any) -> Any:
        assert not training.quantized_inputs
        before = {key: weight.final()[0] for key, weight in learned.items()}
        result = reconstruct(block, learned, training)
        for key, weight in learned.items():
            changed = weight.ungrouped((weight.final()[0] != before[key]).float())
            moved[block.full_name(key)] = changed
        return result

    monkeypatch.setattr(hf_lowbit.calibration.adaptive, "reconstruct", spy)
    decoder(bits=3, iterations=60, activation_bits=None)
    below, skip = moved["shortcut.weight"].split([32, 16], 1)
    assert below.any() and skip.any()


# 4
def test_weights_of_eight_bits_lose_little_and_learned_roundings_less_than_nearest() -> None:
    """On held-out inputs of the convolutions' sum, inputs quantized to 8 bits in all of them."""
    model, eight = decoder()
    errors = {}
    for name, values in {"learned": {"iterations": 150}, "nearest": {"iterations": 0}}.items():
        errors[name] = output_error(model, decoder(bits=4, **values)[1])
    assert output_error(model, eight) < 1e-3
    assert errors["learned"] < 0.8 * errors["nearest"]


@torch.no_grad()
def output_error(model: Decoder, quantized: Decoder) -> float:
    """Squared error beside the square, on inputs that nothing was calibrated on."""
    pairs = [(model(**batch), quantized(**batch)) for batch in batches(seed=1)]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


def test_a_unet_reloads_with_its_groups(tmp_path: Path) -> None:
    tiny = MODELS["text_unet"]
    torch.manual_seed(0)
    config = QDiffusionConfig(iterations=2, num_samples=2)
    model = hf_lowbit.quantize(tiny.build().bfloat16().eval(), config, data=data_of(tiny))
    split = {
        name.partition(".")[0]
        for name, module in packed_modules(model).items()
        if name.endswith("conv_shortcut") and module.layer_spec.activation.group_size is not None
    }
    assert split == {"up_blocks"}
    model.save_pretrained(tmp_path)
    reloaded = tiny.load(tmp_path)
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(tiny.run(reloaded), tiny.run(model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": 1}, "split must be True or False, not 1"),
        ({"search_inputs": "mse"}, "search_inputs must be True or False, not 'mse'"),
        ({"format": "codebook"}, "split=True rounds the parts of a weight each by itself"),
        ({"activation_percentile": 99.0}, "activation_percentile=99.0 is for ranges that are not searched"),
        ({"iterations": -1}, "iterations must be an integer of at least 0, not -1"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"QDiffusionConfig: {message}"):
        QDiffusionConfig(**values)


def test_configs_round_trip() -> None:
    weights_alone = QDiffusionConfig(activation_bits=None)
    assert not weights_alone.activation_static and weights_alone.activation_symmetric
    for config in (QDiffusionConfig(), QDiffusionConfig(bits=8, split=False), weights_alone):
        assert QDiffusionConfig.from_dict(config.to_dict()) == config
