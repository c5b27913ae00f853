"""An English-only Whisper model in CTranslate2's format, converted to a transformers checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_lowbit.testbed.ct2_format import read_ct2

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, WhisperConfig

Variables = Mapping[str, NDArray[np.generic]]

ENGLISH_VOCABULARY = 51_864
END_OF_TEXT, START_OF_TRANSCRIPT, NO_TIMESTAMPS = 50_256, 50_257, 50_362
MAX_TARGET_POSITIONS = 448


def convert_ct2_whisper(model_file: Path, config_file: Path, tokenizer_file: Path, folder: Path) -> None:
    """Write model, generation config, tokenizer and feature extractor to ``folder``, weights in float16.

    Raises:
        ValueError: not an English-only Whisper model with float weights, or its tensors are not those of the
            architecture it describes.
    """
    from transformers import (
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    specification, variables = read_ct2(model_file)
    if specification != "WhisperSpec":
        raise ValueError(f"{model_file.name} holds a {specification}, not a WhisperSpec")
    config = whisper_config(variables)
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(whisper_state_dict(variables), strict=True)
    model.generation_config = generation_config(json.loads(config_file.read_text(encoding="utf-8")))
    model.half().save_pretrained(folder)
    tokenizer = WhisperTokenizer(tokenizer_file=str(tokenizer_file))
    WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer).save_pretrained(folder)


def whisper_config(variables: Variables) -> WhisperConfig:
    """The architecture, read off the shapes.

    Raises:
        ValueError: a vocabulary other than the English one, or integer weights.
    """
    from transformers import WhisperConfig

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    if vocabulary != ENGLISH_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocabulary}: only English-only Whisper ({ENGLISH_VOCABULARY}) is converted")
    if any(array.ndim > 1 and array.dtype.kind != "f" for array in variables.values()):
        raise ValueError("the weights are quantized: only float32 and float16 files are converted")
    layers = {side: _layer_count(variables, side) for side in ("encoder", "decoder")}
    heads = {side: int(variables[f"{side}/num_heads"]) for side in ("encoder", "decoder")}
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads["encoder"],
        decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=START_OF_TRANSCRIPT,
    )


def whisper_state_dict(variables: Variables) -> dict[str, Tensor]:
    """The variables under transformers' names, float32; fused projections are split.

    CTranslate2 fuses query, key and value of self-attention ([3d, d]), and key and value of cross-attention ([2d, d]).
    Its key bias is zero and transformers has none.
    """
    import torch

    state: dict[str, Tensor] = {}

    def copy(source: str, target: str, names: Mapping[str, str]) -> None:
        for ours, theirs in names.items():
            state[f"{target}.{theirs}"] = torch.from_numpy(variables[f"{source}/{ours}"].astype(np.float32))

    def linear(source: str, target: str) -> None:
        copy(source, target, {"weight": "weight", "bias": "bias"})

    def layer_norm(source: str, target: str) -> None:
        copy(source, target, {"gamma": "weight", "beta": "bias"})

    def fused(source: str, target: str, projections: str) -> None:
        linear(source, target)
        weights = state.pop(f"{target}.weight").chunk(len(projections))
        biases = state.pop(f"{target}.bias").chunk(len(projections))
        for name, weight, bias in zip(projections, weights, biases, strict=True):
            state[f"{target}.{name}_proj.weight"] = weight.clone()
            if name != "k":
                state[f"{target}.{name}_proj.bias"] = bias.clone()

    for side in ("encoder", "decoder"):
        layer_norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        copy(f"{side}/position_encodings", f"model.{side}.embed_positions", {"encodings": "weight"})
        for index in range(_layer_count(variables, side)):
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            layer_norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            fused(f"{source}/self_attention/linear_0", f"{target}.self_attn", "qkv")
            linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            layer_norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            if side == "decoder":
                layer_norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
                fused(f"{source}/attention/linear_1", f"{target}.encoder_attn", "kv")
                linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"model.encoder.{name}")
    copy("decoder/embeddings", "model.decoder.embed_tokens", {"weight": "weight"})
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def generation_config(config: Mapping[str, list[int]]) -> GenerationConfig:
    """The generation settings of English-only Whisper, with the suppressed tokens of CTranslate2's ``config.json``."""
    from transformers import GenerationConfig

    return GenerationConfig(
        suppress_tokens=config["suppress_ids"],
        begin_suppress_tokens=config["suppress_ids_begin"],
        alignment_heads=config["alignment_heads"],
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=START_OF_TRANSCRIPT,
        no_timestamps_token_id=NO_TIMESTAMPS,
        max_length=MAX_TARGET_POSITIONS,
        is_multilingual=False,
        return_timestamps=False,
    )


def _layer_count(variables: Variables, side: str) -> int:
    found = (re.match(rf"{side}/layer_(\d+)/", name) for name in variables)
    return 1 + max(int(match.group(1)) for match in found if match)
