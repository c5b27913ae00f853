"""export_model: what it refuses, and that a refusal or a failure leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit import LowRankConfig, RTNConfig
from hf_lowbit.export import ExportError, export_model
from hf_lowbit.export.scheme import scheme_of
from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.nn import LayerSpec
from tests.matrix.models import MODELS

_FIRST = r"^model\.layers\.0\.self_attn\.q_proj: "


def _quantized(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    fields = {"bits": 4, "group_size": 32, **config}
    return hf_lowbit.quantize(MODELS[name].build().to(dtype).eval(), RTNConfig(**fields))


def _refused(model: Any, folder: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(model, folder / "out")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "nf"}, "format 'nf' is a table of values"),
        ({"format": "fp_e2m1"}, "format 'fp_e2m1' is a table"),
        ({"format": "float8_e4m3fn", "bits": 8}, "format 'float8_e4m3fn' is a table"),
        ({"format": "ternary", "bits": 2}, "format 'ternary' is a table"),
        ({"format": "ternary", "bits": 2, "packing": "base3"}, "format 'ternary' is a table"),
        ({"format": "power", "exponent": 0.7}, "format 'power' is a table"),
        ({"format": "codebook", "bits": 2, "codebook": [-1.0, 0.0, 0.5, 1.0]}, "format 'codebook' is a table"),
        ({"bits": 1}, "one bit stands for -1 and"),
        ({"symmetric": False, "real_zero_point": True}, "zero points are real numbers"),
        ({"low_rank": LowRankConfig(rank=4)}, 'low-rank branch has no place.*keep="fused"'),
        ({"activation_format": "float8_e4m3fn"}, "inputs are quantized to float8_e4m3fn 8 bits"),
        ({"activation_bits": 4}, "inputs are quantized to int 4 bits"),
        ({"activation_bits": 8, "activation_group_size": 16}, "inputs are quantized to int 8 bits, groups of 16"),
    ],
)
def test_formats_without_a_counterpart(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The refusal names the layer and the reason, and nothing is written."""
    _refused(_quantized(**config), tmp_path, _FIRST + ".*" + message)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gpt2", {}, r"^transformer\.h\.0\.attn\.c_attn: .* no layer of kind 'transformers_conv1d'"),
        ("whisper", {"group_size": None}, r"^model\.encoder\.conv1: .* no layer of kind 'conv1d'"),
        ("qwen3_moe", {"symmetric": False}, r"^model\.layers\.0\.mlp\.experts: .*without their zero points"),
        ("qwen3_moe", {"activation_bits": 8}, r"^model\.layers\.0\.mlp\.experts: .*without their quantized inputs"),
        (
            "qwen3_moe",
            {"modules_to_not_convert": [r".*\.experts"]},
            r"^model\.layers\.0\.mlp\.experts: .* these are fl",
        ),
        ("qwen3_moe", {"overrides": {r".*\.1\.mlp\.experts": {"bits": 8}}}, "the model's experts have 2 formats"),
        (
            "llama",
            {"symmetric": False, "overrides": {r".*\.down_proj": {"bits": 8}}},
            _FIRST + "transformers reads packed zero points only where all",
        ),
        (
            "llama",
            {"quantize_embeddings": True, "overrides": {r".*\.down_proj": {"bits": 8}}},
            r"^model\.embed_tokens: transformers reads packed embeddings only where all",
        ),
        (
            "mamba2",
            {"modules_to_not_convert": ["conv1d"], "overrides": {r".*\.in_proj": {"bits": 8}}},
            "installed transformers does not load Mamba2ForCausalLM so exported: .*has no attribute 'weight'",
        ),
    ],
)
def test_layers_that_transformers_would_not_load(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _refused(_quantized(name, **config), tmp_path, message)


def test_scales_that_the_type_of_the_model_cannot_hold(tmp_path: Path) -> None:
    """bfloat16 would round float16 scales; in float32 they are exact, and the export says so."""
    model = _quantized(dtype=torch.bfloat16, scale_dtype="float16")
    _refused(model, tmp_path, _FIRST + "its float16 scales are not exact in the model's own type, bfloat16")
    export_model(model.to(torch.float32), tmp_path / "out")


def test_models_that_are_not_quantized_transformers_models(tmp_path: Path) -> None:
    _refused(MODELS["llama"].build(), tmp_path, "this LlamaForCausalLM is not quantized by hf_lowbit")
    plain = hf_lowbit.quantize(nn.Sequential(nn.Linear(32, 8)), RTNConfig(bits=4, group_size=32))
    _refused(plain, tmp_path, "not a Sequential")


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = _quantized()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    _refused(model, tmp_path, r"cannot hold the model's adapters \(default\)")
    compensated = _quantized(low_rank=LowRankConfig(rank=2, keep="adapter"))
    _refused(compensated, tmp_path, r"cannot hold the model's adapters \(lowbit\)")


def test_older_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors up to 0.17 leaves the ends of words empty where the width does not divide 32."""
    from compressed_tensors.compressors.pack_quantized import helpers

    def ten_to_a_word(value: torch.Tensor, num_bits: int, packed_dim: int = 1) -> torch.Tensor:
        return torch.zeros(value.shape[0], -(-value.shape[1] // (32 // num_bits)), dtype=torch.int32)

    monkeypatch.setattr(helpers, "pack_to_int32", ten_to_a_word)
    assert scheme_of(LayerSpec(WeightSpec(bits=4, group_size=32))).bits == 4
    assert scheme_of(LayerSpec(WeightSpec(bits=3), ActivationSpec())).storage == "int-quantized"
    with pytest.raises(ExportError, match="does not pack 3-bit codes in a dense stream"):
        scheme_of(LayerSpec(WeightSpec(bits=3, group_size=32)))


def test_experts_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """Gate and up projections with the same codes: whose is a stored one?"""
    model = _quantized("qwen3_moe")
    codes = model.model.layers[0].mlp.experts.gate_up_proj
    codes[:, 32:] = codes[:, :32].clone()
    _refused(model, tmp_path, "2 of this expert's projections have these codes")


def test_output_in_the_way(tmp_path: Path) -> None:
    model = _quantized()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export_model(model, tmp_path / "full")
    with pytest.raises(NotADirectoryError):
        export_model(model, tmp_path / "full" / "notes.txt")
    with pytest.raises(ExportError, match="unknown export format 'gguf'; known: compressed-tensors"):
        export_model(model, tmp_path / "new", to="gguf")
    (tmp_path / "empty").mkdir()
    assert export_model(model, tmp_path / "empty").layers == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hf_lowbit.export.compressed_tensors.save_torch_state_dict", crash)
    with pytest.raises(OSError, match="no space left"):
        export_model(_quantized(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    """Exporting a live model neither changes it nor what it saves."""
    model = _quantized()
    model.save_pretrained(tmp_path / "packed")  # transformers completes the config of a new model
    before, logits = model.config.to_dict(), MODELS["llama"].run(model)
    export_model(model, tmp_path / "out")
    assert model.config.to_dict() == before and torch.equal(MODELS["llama"].run(model), logits)
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "lowbit_rtn" and stored["bits"] == 4


def test_public_name() -> None:
    """The function has another name than its package: importing the package must not hide the function."""
    import hf_lowbit.export

    assert hf_lowbit.export_model is export_model and "export_model" in dir(hf_lowbit)
