"""Tiny quantized models for the tests of adapters, and what those tests ask of them."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn

from hf_lowbit import RTNConfig
from tests.integrations.tiny_diffusers import conditional_unet
from tests.matrix.models import MODELS, TinyModel


def _image_and_text(dtype: torch.dtype) -> dict[str, Any]:
    image, text = (torch.linspace(-1, 1, size).to(dtype) for size in (4 * 256, 7 * 32))
    return {"sample": image.reshape(1, 4, 16, 16), "timestep": 3, "encoder_hidden_states": text.reshape(1, 7, 32)}


CONDITIONAL = TinyModel(
    "conditional_unet", conditional_unet, "UNet2DConditionModel", _image_and_text, ("to_q", "to_k", "conv1", "proj_in")
)
TINY = {**MODELS, "conditional_unet": CONDITIONAL}


@cache
def checkpoint(name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with the float model."""
    return TINY[name].create(Path(mkdtemp(prefix=f"{name}_")), dtype)


def load(name: str, folder: Path | str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """A model from a folder."""
    return TINY[name].load(Path(folder), dtype, **arguments)


def quantized(name: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """The model, quantized to 4 bits while it loads."""
    config = RTNConfig(**{"bits": 4, "group_size": 16, **fields})
    return load(name, checkpoint(name, dtype), dtype, quantization_config=config)


def run(name: str, model: Any) -> torch.Tensor:
    """Its main output, from inference."""
    return TINY[name].run(model.eval())


def lora_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of one adapter."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name.split("."):
            yield name, parameter


@torch.no_grad()
def perturb(model: nn.Module, adapter: str = "default", scale: float = 0.05) -> None:
    """As if the adapter had been trained."""
    for _, parameter in lora_parameters(model, adapter):
        parameter += scale * torch.randn_like(parameter)


def packed_bytes(model: nn.Module) -> dict[str, bytes]:
    """Bytes of every integer parameter, by its name in the model without adapters."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().numpy().tobytes()
        for name, value in model.named_parameters()
        if not value.is_floating_point()
    }


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """In the Frobenius norm."""
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()
