"""A U-Net whose layers have input scales of each timestep: saved, reloaded, trained, merged and cast."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor

import hf_lowbit
from hf_lowbit.nn.timestep import UnknownTimestepError
from hf_lowbit.plan import packed_modules
from tests.integrations.tiny_diffusers import conditional_unet
from tests.matrix.models import fingerprint

STEPS = (961, 481, 1)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "conv1", "time_emb_proj"], init_lora_weights=False)
_RELOAD = """
import sys, torch
import hf_lowbit
from diffusers import UNet2DConditionModel
model = UNet2DConditionModel.from_pretrained(sys.argv[1])
torch.save(model(**torch.load(sys.argv[2])).sample, sys.argv[3])
"""


def batch(*timesteps: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = conditional_unet().config.in_channels
    sample = torch.randn(len(timesteps), channels, 16, 16, generator=generator)
    return {
        "sample": sample * (0.2 + torch.tensor(timesteps).view(-1, 1, 1, 1) / 500),
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": torch.randn(len(timesteps), 5, 32, generator=generator),
    }


def draw(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**inputs).sample
        return sample


MIXED = batch(961, 20, 500, 481, seed=5)


@pytest.fixture(scope="module")
def quantized() -> Any:
    torch.manual_seed(0)
    config = hf_lowbit.RTNConfig(
        bits=8, group_size=None, activation_bits=8, activation_symmetric=False, activation_static=True,
        activation_timesteps=True, dataset=[batch(step, step, seed=step) for step in STEPS], num_samples=6,
    )  # fmt: skip
    return hf_lowbit.quantize(conditional_unet().eval(), config)


@pytest.fixture(scope="module")
def folder(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("timed") / "unet"
    quantized.save_pretrained(path, max_shard_size="100KB")
    return path


def test_layers_have_their_tables(quantized: Any) -> None:
    modules = packed_modules(quantized)
    assert len(modules) > 20
    assert {module.layer_spec.activation.timesteps for module in modules.values()} == {STEPS}  # type: ignore[union-attr]
    table = modules["conv_in"].input_scale()
    assert table is not None and table[0] > 2 * table[2]
    assert {layer.arithmetic for layer in hf_lowbit.report(quantized).layers} == {"int8"}


def test_each_sample_has_the_scales_of_its_own(quantized: Any) -> None:
    """In batches of several timesteps as alone, and also where guidance has doubled a batch."""
    together = draw(quantized, MIXED)
    for index in range(4):
        own = {key: value[[index]] for key, value in MIXED.items()}
        torch.testing.assert_close(draw(quantized, own), together[[index]], rtol=1e-4, atol=1e-5)
    doubled = {key: torch.cat([value, value]) for key, value in batch(481, 481).items()}
    expected = draw(quantized, doubled)
    for timestep in (481, torch.tensor(481), torch.tensor([481]), 481.0):
        assert torch.equal(draw(quantized, {**doubled, "timestep": timestep}), expected)


def test_reloads_bit_equal(quantized: Any, folder: Path, tmp_path: Path) -> None:
    """From shards, in this process and in a new one."""
    assert len(list(folder.glob("*.safetensors"))) > 3
    reloaded = UNet2DConditionModel.from_pretrained(folder)
    expected = draw(quantized, MIXED)
    assert fingerprint(reloaded) == fingerprint(quantized) and torch.equal(draw(reloaded, MIXED), expected)
    torch.save(MIXED, tmp_path / "in.pt")
    command = [sys.executable, "-c", _RELOAD, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_a_plain_module_reloads(quantized: Any, tmp_path: Path) -> None:
    hf_lowbit.save(quantized, tmp_path / "plain")
    loaded = hf_lowbit.load(tmp_path / "plain", conditional_unet().eval())
    assert torch.equal(draw(loaded, MIXED), draw(quantized, MIXED))


def test_copies_and_casts(quantized: Any) -> None:
    expected = draw(quantized, MIXED)
    half = copy.deepcopy(quantized)
    torch.nn.Module.to(half, torch.bfloat16)  # diffusers' own refuses to cast what is quantized
    tables = {key: value for key, value in fingerprint(quantized).items() if "_input_s" in key}
    assert tables and tables.items() <= fingerprint(half).items()
    inputs = {key: value.to(torch.bfloat16) if key != "timestep" else value for key, value in MIXED.items()}
    assert (draw(half, inputs).float() - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(draw(quantized, MIXED), expected)


@pytest.mark.parametrize("wrapped", [True, False], ids=["get_peft_model", "add_adapter"])
def test_lora_trains_on_mixed_timesteps_and_merges(folder: Path, wrapped: bool) -> None:
    torch.manual_seed(1)
    base = UNet2DConditionModel.from_pretrained(folder)
    base.enable_gradient_checkpointing()
    before, plain = fingerprint(base), draw(base, MIXED)
    if wrapped:
        model = get_peft_model(base, LORA)
    else:
        base.add_adapter(LORA)
        model = base
    model.train()
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    for _ in range(4):
        loss = (model(**MIXED).sample - 0.5 * plain).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
    model.eval()
    trained = draw(model, MIXED)
    if wrapped:
        merged = copy.deepcopy(model).merge_and_unload()
        assert (draw(merged, MIXED) - trained).norm() < 0.2 * trained.norm()
        assert fingerprint(model.unload()) == before
    else:
        base.disable_adapters()
        assert torch.equal(draw(base, MIXED), plain)


def test_dequantized_it_needs_no_timestep_any_more(folder: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(folder)
    with pytest.raises(UnknownTimestepError, match="call the model that holds it"):
        model.conv_in(MIXED["sample"])
    hf_lowbit.dequantize(model)
    assert "forward" not in vars(model) and torch.isfinite(draw(model, MIXED)).all()
