"""QUIK as a plugin: which columns it keeps, what they absorb, and which layers have 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import hf_lowbit
from hf_lowbit import GPTQConfig, QUIKConfig
from hf_lowbit.calibration.checkpoint import Checkpoint
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec, WeightSpec, decode
from hf_lowbit.nn import ExactColumns, PackedLinear
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit_quik.recipe import make_recipe
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import (
    IDLE,
    OUTLIERS,
    logit_error,
    one_token,
    outlier_llama,
    quantized,
    tiny_moe,
    token_batches,
    values_of,
    walk,
)

PLAIN: dict[str, Any] = {"sensitive": []}
FIRST = "model.layers.0.self_attn.q_proj"


def layers_of(model: Any) -> dict[str, PackedLinear]:
    return {name: module for name, module in packed_modules(model).items() if isinstance(module, PackedLinear)}


def warnings_of(model: Any, text: str) -> list[str]:
    return [warning for warning in hf_lowbit.report(model).warnings if text in warning]


def test_injected_outlier_channels_are_kept() -> None:
    """QUIK, test 6. Behind the norms that carry them, of 64 channels 4 are kept."""
    layers = layers_of(quantized(outlier_llama(), QUIKConfig(**PLAIN)))
    for name, layer in layers.items():
        assert layer.layer_spec.exact == ExactColumns(6 if "down" in name else 4), name
        if "o_proj" not in name and "down_proj" not in name:
            assert set(OUTLIERS) <= set(layer.exact_tensors()["index"].tolist()), name


def test_kept_columns_absorb_errors_and_the_others_are_codes() -> None:
    """QUIK, test 2."""
    reference = outlier_llama().get_submodule(FIRST).weight
    layer = layers_of(quantized(outlier_llama(), QUIKConfig(**PLAIN)))[FIRST]
    index = layer.exact_tensors()["index"].long()
    weight, codes = layer.dequantized(), decode(layer.packed())
    assert (weight[:, index] - reference[:, index]).abs().mean() > 1e-5
    rest = torch.ones(64, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(weight[:, rest], codes[:, rest]) and not codes[:, index].any()
    largest = (codes.abs().amax(1) / reference[:, rest].abs().amax(1)).max()
    assert largest < 1.1  # the grid was fitted without the columns that are kept


def test_without_outliers_it_is_gptq() -> None:
    """QUIK, test 1."""
    ours = quantized(outlier_llama(), QUIKConfig(**PLAIN, outliers=0))
    inputs: dict[str, Any] = {"activation_bits": 4, "activation_symmetric": False}
    gptq = quantized(outlier_llama(), GPTQConfig(bits=4, group_size=None, search_clip=False, **inputs))
    assert fingerprint(ours) == fingerprint(gptq)
    high = quantized(outlier_llama(), QUIKConfig(**PLAIN, threshold=1e9))
    assert fingerprint(high) == fingerprint(gptq)


@pytest.mark.parametrize("outliers", [1.0, 4096])
@torch.no_grad()
def test_with_every_column_kept_it_is_the_float_model(outliers: float) -> None:
    """QUIK, test 1."""
    reference = outlier_llama()
    model = quantized(outlier_llama(), QUIKConfig(**PLAIN, outliers=outliers))
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.dequantized(), reference.get_submodule(name).weight, rtol=2**-11, atol=1e-6)
    assert logit_error(model, reference) < 1e-5


def test_kept_columns_lose_far_less_than_none() -> None:
    reference = outlier_llama()
    ours, none = (
        logit_error(quantized(outlier_llama(), QUIKConfig(**PLAIN, outliers=outliers)), reference)
        for outliers in (1 / 16, 0)
    )
    assert ours < 0.2 * none


def test_sensitive_layers_have_eight_bits() -> None:
    model = quantized(outlier_llama(), QUIKConfig(overrides={"layers.1.mlp.down_proj": {"bits": 6}}))
    layers = layers_of(model)
    four, eight = ActivationSpec("int", 4, False), ActivationSpec("int", 8)
    specs = {name: (layer.layer_spec.weight.bits, layer.layer_spec.activation) for name, layer in layers.items()}
    assert specs.pop("model.layers.0.mlp.down_proj") == (8, eight)
    assert specs.pop("model.layers.1.mlp.down_proj") == (6, four)
    assert set(specs.values()) == {(4, four)}
    config = QUIKConfig(format="nf", sensitive=["k_proj"])
    assert config.layer_spec("a.k_proj").weight == WeightSpec("int", 8)
    assert config.layer_spec("down_proj").weight == WeightSpec("nf", 4)
    for name in ("transformer.h.0.mlp.c_proj", "model.decoder.layers.1.fc2", "h.0.mlp.dense_4h_to_h"):
        assert QUIKConfig().layer_spec(name).weight.bits == 8
    assert QUIKConfig().layer_spec("transformer.h.0.attn.c_proj").weight.bits == 4


def test_a_count_and_a_share() -> None:
    assert QUIKConfig().kept_columns(4096) == 256
    assert QUIKConfig(outliers=256).kept_columns(11008) == 256
    assert QUIKConfig(outliers=256).kept_columns(64) == 64
    assert QUIKConfig(outliers=0.5).kept_columns(64) == 32
    assert QUIKConfig.from_dict(json.loads(json.dumps(QUIKConfig(outliers=1.0).to_dict()))).outliers == 1.0


def test_bits_per_weight_count_the_columns() -> None:
    """q_proj: 4 bits, 16 for a scale, 4 of 64 columns of 16 bits and their indices."""
    model = quantized(outlier_llama(), QUIKConfig(**PLAIN))
    entry = next(layer for layer in hf_lowbit.report(model).layers if layer.name == f"{FIRST}.weight")
    assert entry.bits_per_weight == pytest.approx(4 + 16 / 64 + 16 * 4 / 64 + 32 * 4 / 64 / 64)
    assert entry.activation == "int 4 bits, asymmetric" and entry.arithmetic == "int8"


@torch.no_grad()
def test_it_saves_and_reloads_bit_equal_in_shards(tmp_path: Path) -> None:
    model = quantized(outlier_llama(), QUIKConfig())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert fingerprint(reloaded) == fingerprint(model)
    batch = token_batches(1)[0]
    assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {"kind": "columns", "count": 4, "dtype": "float16"} in [entry.get("exact") for entry in stored["plan"]]
    back = hf_lowbit.dequantize(reloaded)
    assert type(back.get_submodule(FIRST)) is torch.nn.Linear
    torch.testing.assert_close(back.get_submodule(FIRST).weight, layers_of(model)[FIRST].dequantized())


def test_a_finished_block_is_taken_from_an_earlier_run(tmp_path: Path) -> None:
    config, models = QUIKConfig(), []
    recipe = make_recipe(config)
    for calibrate in (recipe.calibrate, lambda block: pytest.fail("calibrated again")):
        model = outlier_llama()
        assert calibrate is not None
        walked = walk(model, calibrate, config=config, checkpoint=Checkpoint(tmp_path / "run", "same", True))
        models.append((fingerprint(model), walked.parameters, walked.notes))
    assert models[0] == models[1]


@torch.no_grad()
def test_lora_is_merged_around_what_is_kept() -> None:
    model = quantized(outlier_llama(), QUIKConfig(**PLAIN))
    before = fingerprint(model)
    layer = layers_of(model)[FIRST]
    index = layer.exact_tensors()["index"].long()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora = adapted.base_model.model.get_submodule(FIRST)
    x = torch.randn(5, 64)
    delta = lora.get_delta_weight("default")
    torch.testing.assert_close(lora(x), layer(x) + x @ delta.t())
    expected = layer.dequantized() + delta
    lora.merge()
    torch.testing.assert_close(layer.dequantized()[:, index], expected[:, index], rtol=2**-10, atol=1e-5)
    codes = decode(round_to_nearest(expected.index_fill(1, index, 0), layer.layer_spec.weight))
    assert torch.equal(decode(layer.packed()), codes)
    lora.unmerge()
    adapted.unload()
    assert fingerprint(model) == before


def test_layers_of_other_kinds_keep_no_columns_and_are_noted() -> None:
    model = quantized(tiny_moe(), QUIKConfig())
    noted = warnings_of(model, "layers of kind 'experts' keep no outlier columns: GPTQ alone")
    assert len(noted) == 2 * 4 * 2
    assert len(warnings_of(quantized(tiny_moe(), QUIKConfig(), one_token()), IDLE)) == 2 * 2 * 2
    torch.manual_seed(0)
    inputs = MODELS["whisper"].inputs(torch.float32)
    whisper = MODELS["whisper"].build().eval()
    whisper = hf_lowbit.quantize(whisper, QUIKConfig(dataset=[inputs] * 2, num_samples=2))
    assert len(warnings_of(whisper, "layers of kind 'conv1d' keep no outlier columns")) == 2


def test_a_hessian_that_cannot_be_factorised_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowbit.calibration.reassembling import Similarity

    bad = torch.full((96, 96), 3.0) - 4 * torch.eye(96)
    right = Similarity.matrix.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Similarity, "matrix", property(lambda self: bad if len(self.maximum) == 96 else right(self)))
    model = quantized(outlier_llama(), QUIKConfig(**PLAIN))
    assert len(warnings_of(model, "rounded to nearest")) == 2
    down = layers_of(model)["model.layers.0.mlp.down_proj"]
    assert down.layer_spec.exact is None
    rtn = quantized(outlier_llama(), hf_lowbit.RTNConfig(bits=4, group_size=None))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(values_of(model)[name], values_of(rtn)[name])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"outliers": -1}, "outliers must be a count"),
        ({"outliers": 1.5}, "outliers must be a count"),
        ({"outliers": True}, "outliers must be a count"),
        ({"outliers": "256"}, "outliers must be a count"),
        ({"threshold": -1.0}, "threshold must be a number of at least 0"),
        ({"threshold": float("nan")}, "threshold must be a number of at least 0"),
        ({"damping": 0}, "damping must lie above 0"),
        ({"search_clip": 1}, "search_clip must be True or False"),
        ({"act_order": None}, "act_order must be True or False"),
        ({"sensitive": "down_proj"}, "sensitive must be a list"),
        ({"sensitive": ["("]}, "sensitive: '\\(' is not a valid regular expression"),
        ({"activation_bits": None, "activation_symmetric": True}, "activation_bits must be set"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"QUIKConfig: .*{message}"):
        QUIKConfig(**values)
