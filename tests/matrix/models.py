"""Tiny random models of every architecture that the promises are checked on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class TinyModel:
    """How to build, load and run one architecture.

    Attributes:
        build: a float32 model with random weights.
        auto: name of the class that loads it, in transformers or diffusers.
        inputs: keyword arguments of its forward for a floating type.
        lora: modules that LoRA is trained on.
    """

    name: str
    build: Callable[[], Any]
    auto: str
    inputs: Callable[[torch.dtype], dict[str, Any]]
    lora: tuple[str, ...]

    @property
    def is_denoiser(self) -> bool:
        """Whether diffusers loads it."""
        import diffusers

        return hasattr(diffusers, self.auto)

    def create(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Build and save the float checkpoint, in several shards."""
        torch.manual_seed(0)
        model = self.build().to(dtype)
        model.save_pretrained(folder, max_shard_size="100KB")
        return folder

    def load(self, folder: Path, dtype: torch.dtype | None = torch.bfloat16, **arguments: Any) -> Any:
        """Load a folder, quantized or not."""
        import diffusers
        import transformers

        library = transformers if hasattr(transformers, self.auto) else diffusers
        extra = {} if dtype is None else {"dtype" if library is transformers else "torch_dtype": dtype}
        return getattr(library, self.auto).from_pretrained(folder, **extra, **arguments).eval()

    @torch.no_grad()
    def run(self, model: Any) -> torch.Tensor:
        """The model's main output for its fixed input."""
        output = model(**self.inputs(next(p.dtype for p in model.parameters() if p.is_floating_point())))
        return output.logits if hasattr(output, "logits") else output.sample


def _tokens(dtype: torch.dtype) -> dict[str, Any]:
    return {"input_ids": torch.arange(24)[None] % 250}


def _speech(dtype: torch.dtype) -> dict[str, Any]:
    features = torch.linspace(-1, 1, 16 * 60).reshape(1, 16, 60).to(dtype)
    return {"input_features": features, "decoder_input_ids": torch.arange(6)[None]}


def _image(dtype: torch.dtype) -> dict[str, Any]:
    return {"sample": torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16).to(dtype), "timestep": 3}


def _text_image(dtype: torch.dtype) -> dict[str, Any]:
    states = torch.linspace(-2, 2, 7 * 32).sin().reshape(1, 7, 32).to(dtype)
    return {**_latent("sample", dtype), "encoder_hidden_states": states}


def _class_image(dtype: torch.dtype) -> dict[str, Any]:
    return {**_latent("hidden_states", dtype), "class_labels": torch.tensor([2])}


def _latent(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return {name: torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8).to(dtype), "timestep": torch.tensor([3])}


def _llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True, **sizes)
    return LlamaForCausalLM(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=256, num_key_value_heads=2, **sizes, **experts))


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=8))


def _mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=256, n_groups=2, chunk_size=16, **sizes))


def _whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    positions = {"num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 24}
    config = WhisperConfig(vocab_size=256, **sizes, **heads, **ends, **positions, suppress_tokens=None)
    return WhisperForConditionalGeneration(config)


def _unet() -> Any:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, **blocks)


def _text_unet() -> Any:
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
    return UNet2DConditionModel(
        **sizes, down_block_types=down, up_block_types=up, cross_attention_dim=32, attention_head_dim=8
    )


def _dit() -> Any:
    from diffusers import DiTTransformer2DModel

    sizes = {"sample_size": 8, "patch_size": 2, "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2}
    return DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=10)


MODELS = {
    model.name: model
    for model in (
        TinyModel("llama", lambda: _llama(False), "AutoModelForCausalLM", _tokens, ("q_proj", "down_proj")),
        TinyModel("llama_tied", lambda: _llama(True), "AutoModelForCausalLM", _tokens, ("v_proj", "up_proj")),
        TinyModel("gpt2", _gpt2, "AutoModelForCausalLM", _tokens, ("c_attn", "c_fc")),
        TinyModel("qwen3_moe", _qwen3_moe, "AutoModelForCausalLM", _tokens, ("q_proj", "o_proj")),
        TinyModel("mamba", _mamba, "AutoModelForCausalLM", _tokens, ("in_proj", "x_proj")),
        TinyModel("mamba2", _mamba2, "AutoModelForCausalLM", _tokens, ("in_proj",)),
        TinyModel("whisper", _whisper, "AutoModelForSpeechSeq2Seq", _speech, ("q_proj", "fc1")),
        TinyModel("unet", _unet, "UNet2DModel", _image, ("to_q", "conv1")),
        TinyModel("text_unet", _text_unet, "UNet2DConditionModel", _text_image, ("to_k", "conv1")),
        TinyModel("dit", _dit, "DiTTransformer2DModel", _class_image, ("to_q", "ff.net.2")),
    )
}


def fingerprint(model: Any) -> dict[str, str]:
    """Name -> type, shape and sha256 of every tensor in a model's state dict."""
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"
        for name, tensor in model.state_dict().items()
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
