"""Small random diffusers models of every architecture that the tests name, and inputs for them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

BLOCKS = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
DIT = {"sample_size": 8, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 4, "in_channels": 4}


def unet() -> ModelMixin:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return UNet2DModel(
        **BLOCKS, in_channels=3, out_channels=3, down_block_types=down, up_block_types=up, attention_head_dim=8
    )


def conditional_unet() -> ModelMixin:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        **BLOCKS, down_block_types=down, up_block_types=up, cross_attention_dim=32, attention_head_dim=8
    )


def dit() -> ModelMixin:
    return DiTTransformer2DModel(**DIT, num_layers=2, out_channels=8, num_embeds_ada_norm=10)


def pixart() -> ModelMixin:
    return PixArtTransformer2DModel(
        **DIT,
        num_layers=2,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=32,
        num_embeds_ada_norm=16,
        use_additional_conditions=False,
    )


def sd3() -> ModelMixin:
    return SD3Transformer2DModel(
        **{**DIT, "patch_size": 1},
        num_layers=2,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
    )


def flux() -> ModelMixin:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


_TIME = torch.tensor([3, 7])
_INPUTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"sample": _normal(2, 3, 16, 16), "timestep": _TIME},
    "UNet2DConditionModel": {
        "sample": _normal(2, 4, 16, 16),
        "timestep": _TIME,
        "encoder_hidden_states": _normal(2, 7, 32),
    },
    "DiTTransformer2DModel": {"hidden_states": _normal(2, 4, 8, 8), "timestep": _TIME, "class_labels": _TIME},
    "PixArtTransformer2DModel": {
        "hidden_states": _normal(2, 4, 8, 8),
        "encoder_hidden_states": _normal(2, 7, 32),
        "timestep": _TIME,
        "added_cond_kwargs": {},
    },
    "SD3Transformer2DModel": {
        "hidden_states": _normal(2, 4, 8, 8),
        "encoder_hidden_states": _normal(2, 7, 32),
        "pooled_projections": _normal(2, 64),
        "timestep": _TIME,
    },
    "FluxTransformer2DModel": {
        "hidden_states": _normal(2, 16, 4),
        "encoder_hidden_states": _normal(2, 7, 32),
        "pooled_projections": _normal(2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": _normal(16, 3).abs().floor(),
        "txt_ids": torch.zeros(7, 3),
    },
}
MODELS: dict[str, Callable[[], ModelMixin]] = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional_unet,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
}


def inputs_of(architecture: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Fixed inputs of an architecture, two samples."""
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in _INPUTS[architecture].items()
    }


@torch.no_grad()
def run(model: ModelMixin, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The model's output for fixed inputs of its architecture."""
    return model(**inputs_of(type(model).__name__, dtype), return_dict=False)[0]
