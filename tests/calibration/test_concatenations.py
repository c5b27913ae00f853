"""Layers that read concatenations along channels are found in one forward, whatever the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hf_lowbit.calibration.concatenations import find_concatenations
from tests.integrations.tiny_diffusers import _INPUTS, dit, flux

UNET = Path(__file__).parents[1] / "assets/sd-fashion/unet"


def test_the_shortcuts_of_a_unet_read_hidden_states_and_skips() -> None:
    """Only these: the first convolution of a residual block comes after a norm."""
    model = UNet2DConditionModel.from_pretrained(UNET, torch_dtype=torch.float32)
    batch = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 16, 96),
    }
    found = find_concatenations(model, batch)
    assert found == {
        "up_blocks.0.resnets.0.conv_shortcut": (128, 128),
        "up_blocks.0.resnets.1.conv_shortcut": (128, 64),
        "up_blocks.1.resnets.0.conv_shortcut": (128, 64),
        "up_blocks.1.resnets.1.conv_shortcut": (64, 64),
    }
    for name, parts in found.items():
        assert model.get_submodule(name).in_channels == sum(parts)


def test_the_single_blocks_of_flux_read_attention_and_mlp() -> None:
    found = find_concatenations(flux().eval(), _INPUTS["FluxTransformer2DModel"])
    assert found == {f"single_transformer_blocks.{index}.proj_out": (32, 128) for index in range(2)}


def test_a_model_without_concatenations_has_none() -> None:
    assert find_concatenations(dit().eval(), _INPUTS["DiTTransformer2DModel"]) == {}


class Concatenating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nested, self.cast, self.tokens, self.both, self.mixed = (nn.Linear(6, 6) for _ in range(5))
        self.first, self.sines = nn.Linear(6, 6), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Any:
        """Parts of 1, 2 and 3 channels of ``x``."""
        self.sines(torch.cat([x.sin(), x.cos()], dim=-1))
        x = self.first(x)
        a, b, c = x.split((1, 2, 3), dim=-1)
        whole = torch.cat([torch.cat((a, b), -1), c], dim=-1)
        self.nested(whole)
        self.cast(torch.concat([torch.cat([a, b], axis=2), c], axis=-1).double().float().contiguous())
        self.tokens(torch.cat([x, x], dim=1))
        self.both(torch.cat([x[..., :4], x[..., 4:]], dim=-1))
        self.both(torch.cat([x[..., :4], x[..., 4:]], dim=-1))
        self.mixed(whole)
        return self.mixed(torch.cat([c, c], dim=-1))


def test_parts_of_parts_casts_and_repeated_calls() -> None:
    """Along tokens is no concatenation of channels, nor are features of the model's input; a layer that reads different
    ones cannot be split.
    """
    found = find_concatenations(Concatenating(), {"x": torch.randn(2, 4, 6)})
    assert found == {"nested": (1, 2, 3), "both": (4, 2)}
