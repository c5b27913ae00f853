"""Llamas of random weights, drawn block by block, and the data they are calibrated on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "30b": {
        "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52,
        "num_key_value_heads": 52, "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
LENGTH = 2048


def hollow(shape: str, **sizes: int) -> Any:
    """A Llama whose blocks are on the meta device; the rest is drawn, bfloat16, in the host's memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES[shape], **sizes}, tie_word_embeddings=False, dtype="bfloat16")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        fill(model.get_submodule(name), drawn(model.get_submodule(name), name), "cpu")
    return model.eval()


def drawn(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Weights as transformers initialises them, by a seed of the name; drawn on the card, which is fast."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(parameter: Tensor) -> Tensor:
        if parameter.dim() == 1:
            return torch.ones(parameter.shape, dtype=parameter.dtype, device="cuda")
        return torch.randn(parameter.shape, dtype=parameter.dtype, device="cuda", generator=generator).mul_(0.02)

    return {key: draw(parameter) for key, parameter in module.named_parameters()}


def fill(module: nn.Module, tensors: dict[str, Tensor], device: str) -> None:
    """Put them in the places of meta parameters."""
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor.to(device), False)


def whole(shape: str, device: str = "cpu", **sizes: int) -> Any:
    """All of it in one memory."""
    model = hollow(shape, **sizes)
    for index, layer in enumerate(model.model.layers):
        fill(layer, drawn(layer, f"model.layers.{index}"), device)
    return model.to(device)


def settings(samples: int) -> Any:
    import hf_lowbit

    ids = tokens(samples, 0)
    return hf_lowbit.GPTQConfig(
        bits=4, group_size=128, search_clip=False, dataset=ids, num_samples=samples, sequence_length=LENGTH
    )


def tokens(samples: int, seed: int) -> Tensor:
    return torch.randint(0, 32000, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))
