"""Exported folders, read by plain transformers where hf_lowbit cannot be imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit.plan import packed_modules
from tests.export.cases import CASES
from tests.export.conftest import Reading
from tests.matrix.models import MODELS

_FLOAT_INPUTS = [name for name, case in CASES.items() if "activation_bits" not in case.config]
_QUANTIZED_INPUTS = [name for name in CASES if name not in _FLOAT_INPUTS]


@pytest.fixture
def reading(request: pytest.FixtureRequest, readings: dict[str, Reading]) -> Reading:
    """The case that a test is parametrized with."""
    return readings[request.param]


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    wide = ours.dtype == torch.float32
    return torch.allclose(ours, theirs, atol=1e-5 if wide else 0.02, rtol=0) and theirs.dtype == ours.dtype


@pytest.mark.parametrize("reading", CASES, indirect=True)
def test_the_weights_are_the_same(reading: Reading) -> None:
    """Every decoded weight is bit-equal to ours, and so is every other tensor; nothing is missing or left over."""
    assert reading.read.get("error") is None
    assert reading.read["problems"] == {}
    read, modules = reading.read["weights"], packed_modules(reading.model)
    for name, module in modules.items():
        for parameter in module.packed_parameters:
            ours = module.dequantized(parameter, reading.model.dtype)
            assert read[f"{name}.{parameter}"].dtype == ours.dtype
            assert torch.equal(read[f"{name}.{parameter}"], ours), f"{name}.{parameter}"
    floats = {name: t for name, t in reading.model.state_dict().items() if t.is_floating_point()}
    assert len(floats) > 3 and all(torch.equal(read[name], tensor) for name, tensor in floats.items())


@pytest.mark.parametrize("reading", _FLOAT_INPUTS, indirect=True)
def test_the_logits_are_the_same(reading: Reading, request: pytest.FixtureRequest) -> None:
    tiny = MODELS[CASES[request.node.callspec.params["reading"]].model]
    assert _close(tiny.run(reading.model), reading.read["logits"])


@pytest.mark.parametrize("reading", _QUANTIZED_INPUTS, indirect=True)
def test_quantized_inputs(reading: Reading, request: pytest.FixtureRequest) -> None:
    """transformers quantizes the inputs of exactly those layers, to 8 bits per token, with 127.5 for the largest."""
    case = CASES[request.node.callspec.params["reading"]]
    if case.dtype != torch.float32:
        assert _close(MODELS[case.model].run(reading.model), reading.read["logits"])
        return
    quantized = [name for name, m in packed_modules(reading.model).items() if m.layer_spec.activation is not None]
    model = MODELS[case.model].build().eval()
    model.load_state_dict(reading.read["weights"], strict=False)
    float_logits = MODELS[case.model].run(model)
    for name in quantized:
        model.get_submodule(name).register_forward_pre_hook(_quantize_tokens)
    expected = MODELS[case.model].run(model)
    assert _close(expected, reading.read["logits"])
    assert not _close(float_logits, reading.read["logits"])
    ours = MODELS[case.model].run(reading.model)
    assert (ours - expected).abs().max() < 0.03 * ours.abs().max()


def _quantize_tokens(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
    return (inputs[0] / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("name", CASES)
def test_the_config(name: str, readings: dict[str, Reading]) -> None:
    """It names each layer's format once, in the words of compressed-tensors, and leaves out the float layers."""
    reading, case = readings[name], CASES[name]
    config: dict[str, Any] = reading.config["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["quantization_status"] == "compressed"
    assert config["format"] == case.storage == reading.exported.storage
    assert len(config["config_groups"]) == case.groups == reading.exported.groups
    assert reading.exported.layers == len(packed_modules(reading.model))
    assert reading.exported.bytes == sum(p.stat().st_size for p in reading.exported.output.iterdir())
    assert (not [note for note in reading.exported.vllm if "recent version" not in note]) == case.vllm
    assert ("lm_head" in config["ignore"]) == ("quantize_lm_head" not in case.config and case.model != "whisper")
    for group in config["config_groups"].values():
        assert group["weights"]["type"] == "int"
        assert (group["weights"]["strategy"] == "group") == (group["weights"]["group_size"] is not None)
        assert (group["input_activations"] is not None) == (group["format"] == "int-quantized")


def test_mixed_bits_are_named_layer_by_layer(readings: dict[str, Reading]) -> None:
    groups = readings["mixed-bits"].config["quantization_config"]["config_groups"].values()
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert targets[8] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(targets[4]) == 12 and not set(targets[4]) & set(targets[8])


def test_vllm_needs_one_format_in_fused_layers(tmp_path: Any) -> None:
    from tests.export.cases import Case

    model = Case({"bits": 4, "group_size": 32, "overrides": {r".*\.v_proj": {"bits": 8}}}).quantize(tmp_path / "float")
    (note,) = hf_lowbit.export_model(model, tmp_path / "out").vllm
    assert "q_proj, k_proj, v_proj" in note and "model.layers.0.self_attn" in note


def test_files(readings: dict[str, Reading]) -> None:
    """Packed storage is as small as ours, int4 tensors have vLLM's names and types, and no file of ours is left."""
    from safetensors.torch import load_file

    output = readings["int4-asymmetric"].exported.output
    assert {path.name for path in output.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    tensors = load_file(output / "model.safetensors")
    prefix = "model.layers.0.self_attn.q_proj"
    found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in found.items()} == {
        ".bias": (torch.float32, (64,)),
        ".weight_packed": (torch.int32, (64, 8)),
        ".weight_scale": (torch.float32, (64, 2)),
        ".weight_shape": (torch.int64, (2,)),
        ".weight_zero_point": (torch.int32, (8, 2)),
    }
    integers = load_file(readings["w8a8"].exported.output / "model.safetensors")
    assert integers[f"{prefix}.weight"].dtype == torch.int8 and integers[f"{prefix}.weight_scale"].shape == (64, 1)
    experts = load_file(readings["experts"].exported.output / "model.safetensors")
    assert experts["model.layers.1.mlp.experts.3.up_proj.weight_packed"].shape == (32, 8)
