"""The CTranslate2 converter, on a tiny Whisper that is written in its format by the test."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hf_lowbit.testbed.ct2_format import read_ct2
from hf_lowbit.testbed.ct2_whisper import ENGLISH_VOCABULARY, whisper_config, whisper_state_dict

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def tiny_whisper() -> WhisperForConditionalGeneration:
    """One encoder and two decoder layers of width 8 with 2 heads; every parameter is random."""
    config = WhisperConfig(
        vocab_size=ENGLISH_VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=20, num_mel_bins=5, max_source_positions=6,
        max_target_positions=7, bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def to_ct2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """CTranslate2's variables of a model, as its own converter names and fuses them."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    variables: dict[str, np.ndarray] = {}

    def put(target: str, source: str, norm: bool = False) -> None:
        for theirs, ours in (("gamma", "weight"), ("beta", "bias")) if norm else (("weight",) * 2, ("bias",) * 2):
            variables[f"{target}/{theirs}"] = state[f"{source}.{ours}"]

    def fuse(target: str, source: str, names: str) -> None:
        weights = [state[f"{source}.{name}_proj.weight"] for name in names]
        biases = [state.get(f"{source}.{name}_proj.bias", np.zeros(8, np.float32)) for name in names]
        variables[f"{target}/weight"], variables[f"{target}/bias"] = np.concatenate(weights), np.concatenate(biases)

    for side, count in (("encoder", 1), ("decoder", 2)):
        variables[f"{side}/num_heads"] = np.array(2, np.int16)
        variables[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"model.{side}.layer_norm", norm=True)
        for index in range(count):
            target, source = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            put(f"{target}/self_attention/layer_norm", f"{source}.self_attn_layer_norm", norm=True)
            fuse(f"{target}/self_attention/linear_0", f"{source}.self_attn", "qkv")
            put(f"{target}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            put(f"{target}/ffn/layer_norm", f"{source}.final_layer_norm", norm=True)
            put(f"{target}/ffn/linear_0", f"{source}.fc1")
            put(f"{target}/ffn/linear_1", f"{source}.fc2")
            if side == "decoder":
                put(f"{target}/attention/layer_norm", f"{source}.encoder_attn_layer_norm", norm=True)
                fuse(f"{target}/attention/linear_0", f"{source}.encoder_attn", "q")
                fuse(f"{target}/attention/linear_1", f"{source}.encoder_attn", "kv")
                put(f"{target}/attention/linear_2", f"{source}.encoder_attn.out_proj")
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}", f"model.encoder.{name}")
    variables["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return variables


def write_ct2(path: Path, variables: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", CODES[str(array.dtype)], array.nbytes) + array.tobytes()
    data += struct.pack("<I", len(aliases)) + b"".join(text(alias) + text(name) for alias, name in aliases.items())
    path.write_bytes(data)


def test_the_file_format_is_read_back(tmp_path: Path) -> None:
    variables = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int8),
        "c": np.array([1.5, -2], np.float16),
    }
    write_ct2(tmp_path / "model.bin", variables, {"other": "a"})
    specification, read = read_ct2(tmp_path / "model.bin")
    assert specification == "WhisperSpec"
    assert set(read) == {"a", "b", "c", "other"}
    for name, array in {**variables, "other": variables["a"]}.items():
        np.testing.assert_array_equal(read[name], array)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_ct2(path, {"a": np.zeros(3, np.float32)}, {})
    whole = path.read_bytes()
    for data, message in ((whole[:-2], "cut off"), (whole + b"\0", "1 bytes more"), (whole[:-12], "cut off")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_ct2(path)
    write_ct2(path, {}, {}, version=5)
    with pytest.raises(ValueError, match="version 5"):
        read_ct2(path)


def test_the_converted_model_computes_the_same() -> None:
    model = tiny_whisper()
    variables = to_ct2(model)
    converted = WhisperForConditionalGeneration(whisper_config(variables)).eval()
    converted.load_state_dict(whisper_state_dict(variables), strict=True)
    inputs = {"input_features": torch.randn(1, 5, 12), "decoder_input_ids": torch.tensor([[1, 5, 9]])}
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs).logits, model(**inputs).logits)


def test_other_vocabularies_and_integer_weights_are_refused() -> None:
    variables = to_ct2(tiny_whisper())
    with pytest.raises(ValueError, match="only float32 and float16"):
        whisper_config({**variables, "encoder/layer_0/ffn/linear_0/weight": np.zeros((12, 8), np.int8)})
    with pytest.raises(ValueError, match="51865"):
        whisper_config({**variables, "decoder/embeddings/weight": np.zeros((51_865, 8), np.float32)})
