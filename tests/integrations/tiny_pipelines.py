"""Small random diffusers pipelines: enough of each to draw with."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.integrations.tiny_diffusers import flux, sd3


def vae(channels: int = 4) -> AutoencoderKL:
    """Pictures of 16 x 16 for latents of 8 x 8."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
    )


def dit_pipeline() -> DiffusionPipeline:
    """Class-conditional; its blocks are a chain."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "attention_head_dim": 8, "num_attention_heads": 4, "in_channels": 4, "out_channels": 8}
    return _ready(DiTPipeline(DiTTransformer2DModel(**sizes, num_layers=3), vae(), DDIMScheduler()))


def sdxl_pipeline(heun: bool = False) -> DiffusionPipeline:
    """Its UNet reads a dictionary, added_cond_kwargs. ``heun``: a scheduler that calls it twice in a step."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    scheduler = HeunDiscreteScheduler() if heun else EulerDiscreteScheduler()
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return _ready(StableDiffusionXLPipeline(vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **absent))


def flux_pipeline() -> DiffusionPipeline:
    """Its positions have no batch dimension."""
    torch.manual_seed(0)
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return _ready(FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(1), transformer=flux(), **absent))


def sd3_pipeline() -> DiffusionPipeline:
    """Its blocks return text and image."""
    torch.manual_seed(0)
    absent: dict[str, Any] = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    return _ready(StableDiffusion3Pipeline(sd3(), FlowMatchEulerDiscreteScheduler(), vae(), **absent))


def wan_pipeline() -> DiffusionPipeline:
    """Two denoisers, for the noisy and the clean half of the steps; guidance calls them twice."""
    torch.manual_seed(0)
    coder = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    coder.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    first, second = (WanTransformer3DModel(text_dim=32, freq_dim=32, ffn_dim=64, **sizes) for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return _ready(WanPipeline(None, None, coder, scheduler, first, second, boundary_ratio=0.5))


def embedded_prompt(pooled: int, negative: bool = True) -> dict[str, Any]:
    """A prompt for a pipeline without a text encoder."""
    prompt = {"prompt_embeds": torch.randn(1, 7, 32), "pooled_prompt_embeds": torch.randn(1, pooled)}
    if negative:
        prompt |= {f"negative_{name}": torch.randn_like(value) for name, value in prompt.items()}
    return {**prompt, "height": 16, "width": 16}


def _ready(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
