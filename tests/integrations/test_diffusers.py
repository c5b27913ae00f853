"""diffusers models quantized while they load, saved, and loaded again without a config."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, FluxTransformer2DModel, ModelMixin, UNet2DModel, WanTransformer3DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import nn

import hf_lowbit
from hf_lowbit import LowRankConfig, RTNConfig
from hf_lowbit.nn import CorruptWeightError, PackedModule
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit.state import state_of
from hf_lowbit.tensorwise import QuantizationError
from tests.integrations.tiny_diffusers import MODELS, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
W4 = {"bits": 4, "group_size": 32}
W8 = {"bits": 8, "group_size": None}
diffusers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder with a float32 model for every architecture."""
    result = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        result[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(result[name])
    return result


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def unet_folder(folders: dict[str, Path]) -> Path:
    return folders["UNet2DModel"]


def load(folder: Path, **arguments: Any) -> ModelMixin:
    return AutoModel.from_pretrained(str(folder), **arguments)  # diffusers' AutoModel takes no Path


def quantized(folder: Path, values: dict[str, Any] = W4, **arguments: Any) -> ModelMixin:
    return load(folder, quantization_config=RTNConfig(**values), **arguments)


def assert_same_state(a: nn.Module, b: nn.Module, packed_only: bool = False) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if not packed_only or not tensor.is_floating_point():
            assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a saved model in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rewrite_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def distance(model: ModelMixin, reference: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    return ((run(model, dtype).float() - reference).norm() / reference.norm()).item()


def test_every_method_is_registered() -> None:
    for method in hf_lowbit.methods().values():
        name = str(method.config_class.quant_method)
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is method.config_class and name in AUTO_QUANTIZER_MAPPING


def test_reload_without_a_config_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    model = quantized(folder)
    model.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert (tmp_path / "q" / "lowbit_report.json").is_file() and not (tmp_path / "q" / WEIGHTS).exists()
    loaded = load(tmp_path / "q")
    assert_same_state(model, loaded)
    assert torch.equal(run(model), run(loaded))
    assert (state := state_of(loaded)) is not None and state.source == str(tmp_path / "q")
    loaded.save_pretrained(tmp_path / "q")
    assert (tmp_path / "q" / WEIGHTS).is_file() and not list((tmp_path / "q").glob("*-of-*"))
    assert_same_state(model, load(tmp_path / "q"))


def test_every_layer_is_packed_and_reported(folder: Path) -> None:
    config = RTNConfig(**W4)
    before = copy.deepcopy(config).to_dict()
    model = load(folder, quantization_config=config)
    assert config.to_dict() == before and config.plan is None
    floats = load(folder)
    expected = {name for name, module in floats.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(packed_modules(model)) == expected
    report = state_of(model).report
    assert {layer.name.removesuffix(".weight") for layer in report.layers} == expected
    embeddings = {name for name, module in floats.named_modules() if isinstance(module, nn.Embedding)}
    assert {
        name for name, why in report.skipped.items() if "computes with its scale_shift_table" not in why
    } == embeddings
    assert 4.4 < report.bits_per_weight < 4.6  # 4 bits and a bfloat16 scale for 32 or fewer weights
    assert all(0.02 < layer.error < 0.2 for layer in report.layers)
    stored = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert report.packed_bytes + report.other_bytes == stored + sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in model.named_buffers()
        if name not in model.state_dict()
    )


def test_packed_data_is_the_same_in_every_dtype(folder: Path, tmp_path: Path) -> None:
    model = quantized(folder)
    model.save_pretrained(tmp_path)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        loaded = load(tmp_path, torch_dtype=dtype, device_map="cpu")
        assert loaded.dtype == (dtype or torch.float32)
        assert_same_state(model, loaded, packed_only=True)
        assert run(loaded, loaded.dtype).isfinite().all()


# Relative distance of the output from the float model's, measured: UNets 0.0119 to 0.0134 (weights), 0.030 to 0.032
# (weights and activations), transformers 0.0043 to 0.0055 and 0.0069 to 0.0087; with 4 bits 0.20 to 0.22 and 0.08 to
# 0.11. In bfloat16 8-bit weights give 0.017 to 0.020 and 0.007 to 0.009.
@pytest.mark.parametrize(
    ("values", "dtype", "unet", "transformer"),
    [
        (W8, torch.float32, 0.02, 0.008),
        (W8, torch.bfloat16, 0.03, 0.014),
        (W8, torch.float16, 0.02, 0.008),
        ({**W8, "activation_bits": 8}, torch.float32, 0.05, 0.013),
        (W4, torch.float32, 0.33, 0.17),
    ],
    ids=["W8", "W8 bfloat16", "W8 float16", "W8A8", "W4"],
)
def test_output_is_close(folder: Path, values: Any, dtype: torch.dtype, unet: float, transformer: float) -> None:
    model = quantized(folder, values, torch_dtype=dtype)
    assert model.dtype == dtype
    limit = unet if "UNet" in type(model).__name__ else transformer
    assert 0 < distance(model, run(load(folder)), dtype) < limit
    arithmetic = {layer.arithmetic for layer in state_of(model).report.layers}
    assert arithmetic == ({"int8"} if "activation_bits" in values else {"decoded"})


@pytest.mark.parametrize("name", ["UNet2DModel", "FluxTransformer2DModel"])
def test_low_rank_branch(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = folders[name]
    reference = run(load(folder))
    model = quantized(folder, {**W4, "low_rank": LowRankConfig(rank=2)})
    assert distance(model, reference) < distance(quantized(folder), reference)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_state(model, loaded)
    assert torch.equal(run(model), run(loaded))


def test_low_rank_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["FluxTransformer2DModel"]
    reference = run(load(folder))
    model = quantized(folder, {**W4, "low_rank": LowRankConfig(rank=2, keep="adapter")})
    assert distance(model, reference) < distance(quantized(folder), reference)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "lowbit_adapter" / "adapter_config.json").is_file()
    assert torch.equal(run(model), run(load(tmp_path)))


def test_dequantized_model_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    model = quantized(folder)
    before = run(model)
    model.dequantize()
    assert not any(isinstance(module, PackedModule) for module in model.modules()) and state_of(model) is None
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_state(model, load(tmp_path))


def test_adopted_model_is_like_a_loaded_one(unet_folder: Path, tmp_path: Path) -> None:
    model = hf_lowbit.quantize(UNet2DModel.from_pretrained(unet_folder), RTNConfig(**W4))
    assert_same_state(model, quantized(unet_folder))
    model.save_pretrained(tmp_path)
    assert_same_state(model, UNet2DModel.from_pretrained(tmp_path))
    model.dequantize()


@pytest.mark.parametrize("arguments", [{"variant": "w4"}, {"safe_serialization": False}])
def test_other_ways_to_save(unet_folder: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = quantized(unet_folder)
    model.save_pretrained(tmp_path, **arguments)
    variant = arguments.get("variant")
    loaded = UNet2DModel.from_pretrained(tmp_path, variant=variant, use_safetensors=variant is not None)
    assert_same_state(model, loaded)


def test_a_copy_saves_itself(unet_folder: Path, tmp_path: Path) -> None:
    model = quantized(unet_folder)
    twin = copy.deepcopy(model)
    twin.conv_in.bias.data.fill_(1.0)
    twin.save_pretrained(tmp_path)
    assert_same_state(twin, UNet2DModel.from_pretrained(tmp_path))


def test_reload_in_a_fresh_process(unet_folder: Path, tmp_path: Path) -> None:
    model = quantized(unet_folder)
    model.save_pretrained(tmp_path / "q")
    script = (
        "import sys, torch, hf_lowbit; torch.set_num_threads(1); from diffusers import AutoModel\n"
        "from tests.integrations.tiny_diffusers import run\n"
        "model = AutoModel.from_pretrained(sys.argv[1]); torch.save((model.state_dict(), run(model)), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "q"), str(tmp_path / "out.pt")], check=True)
    state, output = torch.load(tmp_path / "out.pt")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(output, run(model), rtol=0, atol=1e-5)  # another process may use other threads


def test_what_the_library_keeps_in_float32_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    WanTransformer3DModel(**sizes, ffn_dim=32, num_layers=2, rope_max_seq_len=32).save_pretrained(tmp_path / "float")
    model = quantized(tmp_path / "float", torch_dtype=torch.bfloat16)
    reasons = state_of(model).report.skipped
    assert "float32" in reasons["condition_embedder.time_embedder.linear_1"]
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "q")
    assert_same_state(model, WanTransformer3DModel.from_pretrained(tmp_path / "q", torch_dtype=torch.bfloat16))


def test_single_file_and_device_map(folders: dict[str, Path]) -> None:
    folder = folders["FluxTransformer2DModel"]
    config = RTNConfig(**W4)
    single = FluxTransformer2DModel.from_single_file(
        str(folder / WEIGHTS), config=str(folder), quantization_config=config, torch_dtype=torch.float32
    )
    assert_same_state(single, quantized(folder))
    assert_same_state(single, quantized(folder, device_map="auto"))


def test_changes_nobody_asked_for_are_logged(unet_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        model = quantized(unet_folder, {**W4, "modules_to_not_convert": ["conv_in", "nowhere"]})
    assert "conv_in" in state_of(model).report.skipped and type(model.conv_in) is nn.Conv2d
    assert "'nowhere' matches no module" in caplog.text
    with pytest.raises(PlanError, match="conv_in: group_size=32 does not divide the input width 27"):
        quantized(unet_folder, {**W4, "strict_groups": True})


def test_a_config_for_a_quantized_checkpoint_is_ignored_with_a_warning(unet_folder: Path, tmp_path: Path) -> None:
    model = quantized(unet_folder)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="from the model will be used"):
        assert_same_state(model, quantized(tmp_path, W8))


def test_offload_is_refused(unet_folder: Path, tmp_path: Path) -> None:
    disk = {"device_map": {"": "cpu", "mid_block": "disk"}, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match="cannot quantize while part of the model is offloaded to disk"):
        quantized(unet_folder, **disk)
    with pytest.raises(QuantizationError, match="without offload_state_dict"):
        quantized(unet_folder, offload_state_dict=True)
    quantized(unet_folder).save_pretrained(tmp_path / "q")
    with pytest.raises(CorruptWeightError, match="offload_state_dict"):
        UNet2DModel.from_pretrained(tmp_path / "q", offload_state_dict=True)


def test_casting_is_refused_and_changes_nothing(unet_folder: Path) -> None:
    model = quantized(unet_folder)
    before = copy.deepcopy(model)
    for cast in (model.half, model.float, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    assert_same_state(model, before)


def test_fusing_projections_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        quantized(folders["UNet2DConditionModel"]).fuse_qkv_projections()


def test_failures_name_the_layer(unet_folder: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"][0, 0] = torch.nan

    model = UNet2DModel.from_pretrained(unet_folder)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, spoil)
    with pytest.raises(QuantizationError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        quantized(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("conv_out.weight"))
    with pytest.raises(QuantizationError, match=r"1 of \d+ planned layers were not quantized.*conv_out"):
        quantized(tmp_path)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"conv_out.weight": tensors["conv_out.weight"].to(torch.int8)}))
    with pytest.raises(QuantizationError, match=r"conv_out\.weight is stored as torch\.int8"):
        quantized(tmp_path)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight"] = torch.zeros(32, 5, dtype=torch.int32)


def float_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight_scale"] = tensors["conv_in.weight_scale"].float()


def infinite_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight_scale"][0] = torch.tensor(torch.inf).bfloat16().view(torch.int16)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (widen, r"conv_in\.weight is \(32, 5\) torch\.int32 in the checkpoint, but the plan says"),
        (float_scale, r"conv_in\.weight_scale is .* torch\.float32 in the checkpoint, but the plan says"),
        (infinite_scale, r"conv_in: weight_scale holds NaN or infinite values"),
        (lambda tensors: tensors.pop("conv_in.weight_scale"), r"1 tensors of the plan .*conv_in\.weight_scale"),
    ],
    ids=["shape", "dtype", "infinite", "missing"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_damaged_checkpoint_is_refused(
    unet_folder: Path, tmp_path: Path, damage: Any, message: str, dtype: torch.dtype | None
) -> None:
    quantized(unet_folder).save_pretrained(tmp_path)
    rewrite(tmp_path, damage)
    with pytest.raises(CorruptWeightError, match=message):
        UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)


def more_bits(config: dict[str, Any]) -> None:
    for entry in config["plan"]:
        entry["weight"]["bits"] = 8


def elsewhere(config: dict[str, Any]) -> None:
    config["plan"][0]["modules"] = ["conv_nowhere"]


def not_a_layer(config: dict[str, Any]) -> None:
    config["plan"][0]["modules"] = ["conv_norm_out"]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (more_bits, CorruptWeightError, "but the plan says .*; the checkpoint is damaged or its config was edited"),
        (elsewhere, PlanError, "the plan names 'conv_nowhere', which this model does not have"),
        (
            not_a_layer,
            PlanError,
            "entry for conv_norm_out does not fit this model: a GroupNorm is not a Conv2d",
        ),
        (lambda config: config.pop("plan"), PlanError, "quantization_config has no plan"),
        (lambda config: config.update(bitz=4), ValueError, "has no field bitz; did you mean 'bits'"),
    ],
)
def test_edited_config_is_refused(unet_folder: Path, tmp_path: Path, edit: Any, error: Any, message: str) -> None:
    quantized(unet_folder).save_pretrained(tmp_path)
    rewrite_config(tmp_path, edit)
    with pytest.raises(error, match=message):
        UNet2DModel.from_pretrained(tmp_path)


def test_stored_patterns_stand_for_packed_layers_only(folders: dict[str, Path]) -> None:
    """diffusers puts linear layers and dropout into one list: to_out.0 and to_out.1, ff.net.2 and ff.net.1."""
    model = quantized(folders["PixArtTransformer2DModel"])
    modules = [name for entry in state_of(model).config.plan for name in entry["modules"]]
    assert {
        "transformer_blocks.*.attn1.to_q",
        "transformer_blocks.*.attn1.to_out.0",
        "transformer_blocks.*.ff.net.2",
    } <= {*modules}
    assert not any(name.endswith("*") for name in modules)
