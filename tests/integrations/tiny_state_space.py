"""Tiny random models of every architecture with a state-space mixer, and what their tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 128
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
# Two groups, four heads of 16; a chunk that does not divide the tests' sequences.
_SECOND = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}


@dataclass(frozen=True)
class TinyMixer:
    """One architecture.

    Attributes:
        mixer: the class of its mixers.
        generation: 1 (Mamba) or 2 (Mamba-2).
        build: a float32 model, its parameters as the library initialises them.
        lora: projections that PEFT adapts there; it refuses others of these architectures, or the library does not
            call them.
        is_hybrid: whether it also has layers of attention.
    """

    mixer: str
    generation: int
    build: Callable[[], Any]
    lora: tuple[str, ...] = ("in_proj",)
    is_hybrid: bool = True

    def create(self, seed: int = 0) -> Any:
        """The model with random values everywhere: none of ones, zeros, or equal per head."""
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                last = name.rpartition(".")[2]
                if last == "A_log":
                    parameter.uniform_(-1.5, 1.5)
                elif last == "dt_bias" or name.endswith("dt_proj.bias"):
                    parameter.uniform_(-3, 1)
                elif last == "D" or "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif parameter.dim() == 1:
                    parameter.normal_(std=0.1)
                elif "conv1d" in name:
                    parameter.normal_(std=0.5)
                elif parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        return model


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**_SIZES, num_hidden_layers=2, state_size=8, use_bias=True))


def _mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8}
    return Mamba2ForCausalLM(Mamba2Config(**_SIZES, **heads, num_hidden_layers=2, use_bias=True))


def _falcon_mamba() -> Any:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    return FalconMambaForCausalLM(FalconMambaConfig(**_SIZES, num_hidden_layers=2, state_size=8))


def _jamba() -> Any:
    from transformers import JambaConfig, JambaForCausalLM

    layers = {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2}
    return JambaForCausalLM(JambaConfig(**_SIZES, **_ATTENTION, **layers, num_experts_per_tok=2, mamba_d_state=8))


def _bamba() -> Any:
    from transformers import BambaConfig, BambaForCausalLM

    return BambaForCausalLM(BambaConfig(**_SIZES, **_ATTENTION, **_SECOND, num_hidden_layers=3, attn_layer_indices=[1]))


def _zamba2() -> Any:
    from transformers import Zamba2Config, Zamba2ForCausalLM

    heads = {"n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 4}
    layers = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]}
    return Zamba2ForCausalLM(Zamba2Config(**_SIZES, **heads, **layers, num_attention_heads=4, intermediate_size=48))


def _nemotron_h() -> Any:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    heads = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}
    config = NemotronHConfig(**_SIZES, **_ATTENTION, **heads, head_dim=8, layers_block_type=[*_LAYERS, "mlp"])
    return NemotronHForCausalLM(config)


def falcon_h1(**fields: Any) -> Any:
    """Falcon-H1, whose gated norm is optional and comes before or after the gate."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    multipliers = {"ssm_multipliers": [0.7, 1.3, 0.9, 1.1, 0.8], "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.9}
    defaults: dict[str, Any] = {"num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_rms_norm": True}
    return FalconH1ForCausalLM(
        FalconH1Config(**_SIZES, **_ATTENTION, **_SECOND, **multipliers, **{**defaults, **fields})
    )


def _granite() -> Any:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
    config = GraniteMoeHybridConfig(
        **_SIZES, **_ATTENTION, **_SECOND, **experts, num_hidden_layers=3, layer_types=_LAYERS
    )
    return GraniteMoeHybridForCausalLM(config)


TINY: dict[str, TinyMixer] = {
    "mamba": TinyMixer("MambaMixer", 1, _mamba, ("in_proj", "x_proj"), is_hybrid=False),
    "falcon_mamba": TinyMixer("FalconMambaMixer", 1, _falcon_mamba, ("in_proj", "x_proj"), is_hybrid=False),
    "jamba": TinyMixer("JambaMambaMixer", 1, _jamba, ("in_proj", "x_proj")),
    "mamba2": TinyMixer("Mamba2Mixer", 2, _mamba2, is_hybrid=False),
    "bamba": TinyMixer("BambaMixer", 2, _bamba),
    "zamba2": TinyMixer("Zamba2MambaMixer", 2, _zamba2),
    "nemotron_h": TinyMixer("NemotronHMamba2Mixer", 2, _nemotron_h),
    "falcon_h1": TinyMixer("FalconH1Mixer", 2, lambda: falcon_h1(mamba_norm_before_gate=False)),
    "falcon_h1_norm_first": TinyMixer("FalconH1Mixer", 2, lambda: falcon_h1(mamba_norm_before_gate=True)),
    "falcon_h1_no_norm": TinyMixer("FalconH1Mixer", 2, lambda: falcon_h1(mamba_rms_norm=False)),
    "granite": TinyMixer("GraniteMoeHybridMambaLayer", 2, _granite),
}


def mixers_of(model: nn.Module, cls: str) -> dict[str, nn.Module]:
    """Name -> module of every stock mixer of this class."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == cls}


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """``[batch, length]``, without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(value: Tensor, reference: Tensor) -> float:
    """Error in the Frobenius norm."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def packed_floats(model: Any) -> Any:
    """The model with every stock mixer replaced by a packed one in which nothing is packed yet."""
    from hf_lowbit.formats import WeightSpec
    from hf_lowbit.nn import KINDS, LayerSpec, MixerSpec, mixer_kind
    from hf_lowbit.plan import replace_modules

    spec = LayerSpec(WeightSpec(bits=8, group_size="tensor"), mixer=MixerSpec())
    found = {name: module for name, module in model.named_modules() if hasattr(module, "A_log")}
    packed = {name: KINDS[str(mixer_kind(module))].from_float(module, spec) for name, module in found.items()}
    replace_modules(model, {name: module.train(model.training) for name, module in packed.items()})
    return model


def step(model: Any, x: Tensor, cache: Any, **arguments: Any) -> Tensor:
    """The model's logits ``[batch, tokens, vocabulary]`` for what comes next, with a cache by either of its names."""
    if type(model).__name__.startswith(("Mamba", "FalconMamba")):
        arguments["cache_params"] = cache
    else:  # Bamba counts from zero in every call
        positions = torch.arange(x.shape[1])[None] + cache.get_seq_length()
        arguments |= {"past_key_values": cache, "position_ids": positions}
    logits: Tensor = model(x, use_cache=True, **arguments).logits
    return logits


def config_of(name: str, **fields: Any) -> Any:
    """The method of the model's generation."""
    from hf_lowbit_quamba import QuambaConfig
    from hf_lowbit_quamba2 import Quamba2Config

    if TINY[name].generation == 1:
        return QuambaConfig(**{"num_samples": 16, **fields})
    return Quamba2Config(**{"head_clusters": 2, "channel_clusters": 2, "rotate": False, "num_samples": 16, **fields})


def quantized(name: str, **fields: Any) -> Any:
    """The model, quantized on random tokens."""
    import hf_lowbit

    data = [{"input_ids": tokens(4, 24, seed)} for seed in range(2, 6)]
    return hf_lowbit.quantize(TINY[name].create(), config_of(name, **fields), data=data)


@cache
def folder(name: str) -> Path:
    """Where the quantized model is saved."""
    path = Path(mkdtemp(prefix=f"{name}_"))
    quantized(name).save_pretrained(path)
    return path


def loaded(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The quantized model from its folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(name), dtype=dtype).eval()
