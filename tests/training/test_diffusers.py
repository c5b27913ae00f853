"""LoRA on quantized denoisers of diffusion pipelines: trained, saved as diffusers saves it, and found by a new load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor

import hf_lowbit
from hf_lowbit import RTNConfig
from tests.integrations.tiny_peft import packed_bytes, relative_error
from tests.training.formats import FORMATS

ASSETS = Path(__file__).parents[1] / "assets"
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
some_formats = pytest.mark.parametrize("name", ["int4", "nf4", "int8 inputs", "branch"])


def config(name: str) -> RTNConfig:
    return RTNConfig(**{"group_size": 32, **FORMATS[name]})


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def unet(name: str) -> Any:
    folder = ASSETS / "sd-fashion" / "unet"
    return UNet2DConditionModel.from_pretrained(folder, quantization_config=config(name), torch_dtype=torch.float32)


def dit(name: str) -> Any:
    folder = ASSETS / "dit-fashion" / "transformer"
    return DiTTransformer2DModel.from_pretrained(folder, quantization_config=config(name), torch_dtype=torch.float32)


def denoise_unet(model: Any) -> Tensor:
    text = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(1))
    return model(latents(), torch.tensor([20, 600]), text).sample


def denoise_dit(model: Any) -> Tensor:
    return model(latents(), torch.tensor([20, 600]), torch.tensor([1, 3])).sample


def train(model: Any, denoise: Callable[[Any], Tensor], steps: int = 6) -> list[float]:
    """Towards a fixed target, all adapters and nothing else."""
    codes = packed_bytes(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=5e-3), []
    for _ in range(steps):
        loss = (denoise(model.train()) - latents().flip(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in trained) and packed_bytes(model) == codes
    return losses


@torch.no_grad()
def output(model: Any, denoise: Callable[[Any], Tensor]) -> Tensor:
    return denoise(model.eval())


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("int4", True), ("nf4", False), ("int8 inputs", False), ("branch", False)]
)
def test_a_unet(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model = hf_lowbit.prepare_for_training(unet(name), gradient_checkpointing=checkpointing)
    before = output(model, denoise_unet)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=UNET_TARGETS))
    losses = train(model, denoise_unet)
    assert losses[-1] < 0.9 * losses[0]
    expected = output(model, denoise_unet)
    assert relative_error(expected, before) > 0.01
    model.save_lora_adapter(tmp_path)
    again = unet(name)
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(output(again, denoise_unet), expected)


def test_the_weights_of_a_pipeline(tmp_path: Path) -> None:
    """``save_lora_weights`` and ``load_lora_weights``, with the denoiser quantized in both pipelines."""
    model = hf_lowbit.prepare_for_training(unet("int4"), gradient_checkpointing=False)
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=UNET_TARGETS)
    model.add_adapter(adapter)
    train(model, denoise_unet)
    expected = output(model, denoise_unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(model))
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "sd-fashion", unet=unet("int4"), safety_checker=None)
    plain = output(pipeline.unet, denoise_unet)
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(output(pipeline.unet, denoise_unet), expected)
    pipeline.unload_lora_weights()
    assert torch.equal(output(pipeline.unet, denoise_unet), plain)


@some_formats
def test_a_dit(name: str, tmp_path: Path) -> None:
    """diffusers' DiT has no adapter methods of its own: PEFT's model goes around it."""
    model = get_peft_model(
        hf_lowbit.prepare_for_training(dit(name)), LoraConfig(r=4, target_modules=["to_q", "to_v", "ff.net.2"])
    )
    losses = train(model, denoise_dit)
    assert losses[-1] < 0.95 * losses[0]
    expected = output(model, denoise_dit)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(dit(name), tmp_path)
    assert torch.equal(output(again, denoise_dit), expected)
