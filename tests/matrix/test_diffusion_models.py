"""Denoisers of the large pipelines, tiny and random: rounded, calibrated and split, they save and reload bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import hf_lowbit
from hf_lowbit import LowRankConfig, QDiffusionConfig, RTNConfig, SVDQuantConfig
from hf_lowbit.config import LowbitConfig
from hf_lowbit.plan import packed_modules
from tests.integrations import tiny_diffusers
from tests.matrix.models import fingerprint


@dataclass(frozen=True)
class Denoiser:
    """How to build and call one.

    Attributes:
        auto: name of its class in diffusers.
        inputs: keyword arguments, two samples.
    """

    auto: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]

    def load(self, folder: Path) -> Any:
        import diffusers

        return getattr(diffusers, self.auto).from_pretrained(folder, torch_dtype=torch.bfloat16).eval()


def _sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel(
        **{**tiny_diffusers.BLOCKS, "sample_size": 8},
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def _wan() -> Any:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    return WanTransformer3DModel(**sizes, ffn_dim=64, num_layers=2, rope_max_seq_len=32, freq_dim=32)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _sdxl_inputs() -> dict[str, Any]:
    added = {"text_embeds": _normal(2, 32), "time_ids": 8 * _normal(2, 6).abs()}
    return {
        "sample": _normal(2, 4, 8, 8),
        "timestep": torch.tensor([7, 7]),
        "encoder_hidden_states": _normal(2, 7, 32),
        "added_cond_kwargs": added,
    }


def _wan_inputs() -> dict[str, Any]:
    text = _normal(2, 5, 16)
    return {"hidden_states": _normal(2, 4, 2, 4, 4), "timestep": torch.tensor([7, 7]), "encoder_hidden_states": text}


def _of_integrations(architecture: str) -> Denoiser:
    def inputs() -> dict[str, Any]:
        return tiny_diffusers.inputs_of(architecture)

    return Denoiser(architecture, tiny_diffusers.MODELS[architecture], inputs)


DENOISERS = {
    "sdxl": Denoiser("UNet2DConditionModel", _sdxl, _sdxl_inputs),
    "pixart": _of_integrations("PixArtTransformer2DModel"),
    "sd3": _of_integrations("SD3Transformer2DModel"),
    "flux": _of_integrations("FluxTransformer2DModel"),
    "wan": Denoiser("WanTransformer3DModel", _wan, _wan_inputs),
}
CONFIGS: dict[str, LowbitConfig] = {
    "rtn": RTNConfig(bits=4, group_size=32, activation_bits=8),
    "svdquant": SVDQuantConfig(low_rank=LowRankConfig(rank=2), smooth_steps=2, iterations=2, num_samples=2),
    "q_diffusion": QDiffusionConfig(iterations=2, num_samples=2),
}


def call(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of a model that was loaded in bfloat16."""
    own = tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)
    with torch.no_grad():
        return model(**own, return_dict=False)[0]


@pytest.mark.parametrize(
    "config_name", [pytest.param(m, marks=[] if m == "rtn" else pytest.mark.slow) for m in CONFIGS]
)
@pytest.mark.parametrize("name", DENOISERS)
def test_saves_and_reloads_bit_equal(name: str, config_name: str, tmp_path: Path) -> None:
    denoiser, config = DENOISERS[name], CONFIGS[config_name]
    torch.manual_seed(0)
    denoiser.build().to(torch.bfloat16).save_pretrained(tmp_path / "float")
    data = None if config_name == "rtn" else [denoiser.inputs()]
    reference = call(denoiser.load(tmp_path / "float"), denoiser.inputs()).float()
    model = hf_lowbit.quantize(denoiser.load(tmp_path / "float"), config, data=data)
    output = call(model, denoiser.inputs())
    assert torch.isfinite(output).all() and (output.float() - reference).norm() < 0.8 * reference.norm()
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    reloaded = denoiser.load(tmp_path / "packed")
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(call(reloaded, denoiser.inputs()), output)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("sdxl", "conv_shortcut"), ("flux", "proj_out")])
def test_what_reads_a_concatenation_is_split(name: str, layers: str) -> None:
    """The shortcuts of a U-Net's decoder, and attention beside feed-forward in Flux' single blocks."""
    denoiser = DENOISERS[name]
    torch.manual_seed(0)
    model = hf_lowbit.quantize(denoiser.build().eval(), CONFIGS["q_diffusion"], data=[denoiser.inputs()])
    split = {
        name
        for name, module in packed_modules(model).items()
        if module.layer_spec.weight.group_size is not None and module.layer_spec.activation.group_size is not None
    }
    blocks = ("up_blocks", "single_transformer_blocks")
    wanted = {n for n in packed_modules(model) if n.startswith(blocks) and n.endswith(layers)}
    assert wanted and wanted <= split
