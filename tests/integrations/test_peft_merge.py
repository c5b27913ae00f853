"""Merging adapters into packed weights, taking them out again, and what a merged model saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from hf_lowbit import LowRankConfig, RTNConfig, quantize, report
from hf_lowbit.formats import decode
from hf_lowbit.integrations.peft_layers import LORA_LAYERS
from hf_lowbit.nn import PackedModule
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.state import state_of
from tests.integrations.tiny_peft import load, packed_bytes, perturb, quantized, relative_error, run

DTYPES = [torch.float32, torch.bfloat16]
TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_fc"],
    "whisper": ["q_proj", "fc1", "conv1"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "conditional_unet": ["to_q", "conv1", "proj_in"],
}
BRANCHES = [None, LowRankConfig(3)]


def adapted(name: str, model: Any, adapter: str = "default", **fields: Any) -> dict[str, Any]:
    """Put an adapter in the model, as every way to add one does in the end, and train it; its layers by name."""
    inject_adapter_in_model(LoraConfig(**{"r": 4, "target_modules": TARGETS[name], **fields}), model, adapter)
    perturb(model, adapter)
    return layers_of(model)


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, tuple(LORA_LAYERS.values()))}


@pytest.mark.parametrize("branch", BRANCHES, ids=["plain", "branch"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "conditional_unet"])
def test_merging_is_the_recipe_on_the_adapted_weight_and_unmerging_is_exact(name: str, dora: bool, branch: Any) -> None:
    model = quantized(name, low_rank=branch, quantize_embeddings=name == "llama")
    layers = adapted(name, model, use_dora=dora)
    output, codes = run(name, model), packed_bytes(model)
    for layer in layers.values():
        packed = layer.base_layer
        layer.base_layer = expected = packed.to_float(torch.float32)
        layer.merge()  # PEFT's own
        layer.merged_adapters = []
        layer.base_layer = packed
        layer.merge(safe_merge=True)
        matrix = packed.to_matrix("weight", expected.weight.detach())
        rounded = round_to_nearest(matrix, packed.layer_spec.weight)
        assert torch.equal(packed.weight, rounded.weight) and torch.equal(packed.weight_scale, rounded.scale)
        error = (packed.to_matrix("weight", packed.dequantized()) - matrix).norm()
        plain = (decode(rounded) - matrix).norm()
        assert error == plain if branch is None else error < plain  # the branch follows the merged weight
    assert relative_error(run(name, model), output) < 0.3
    assert packed_bytes(model) != codes
    for layer in layers.values():
        layer.unmerge()
    assert packed_bytes(model) == codes
    assert torch.equal(run(name, model), output)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branch", BRANCHES, ids=["plain", "branch"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "qwen3_moe"])
def test_a_merged_model_saves_and_loads_like_a_quantized_one(
    name: str, branch: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = quantized(name, dtype, low_rank=branch)
    bits = report(base).bits_per_weight
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[t for t in TARGETS[name] if t != "embed_tokens"]))
    perturb(model)
    adapted_output = run(name, model)
    merged = model.merge_and_unload(safe_merge=True)
    output = run(name, merged)
    assert not layers_of(merged) and relative_error(output, adapted_output) < 0.3
    merged.save_pretrained(tmp_path)
    loaded = load(name, tmp_path, dtype)
    assert torch.equal(run(name, loaded), output) and packed_bytes(loaded) == packed_bytes(merged)
    assert report(loaded).bits_per_weight == pytest.approx(bits)


def test_unload_gives_the_packed_base_back() -> None:
    base = quantized("llama")
    output, codes = run("llama", base), packed_bytes(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    perturb(model)
    assert not torch.equal(run("llama", model), output)
    unloaded = model.unload()
    assert unloaded is base and torch.equal(run("llama", base), output) and packed_bytes(base) == codes
    assert isinstance(base.model.layers[0].self_attn.q_proj, PackedModule)


def test_several_adapters_are_rounded_once_however_they_are_merged() -> None:
    model = quantized("llama")
    adapted("llama", model, "first")
    layers = adapted("llama", model, "second", use_dora=True)
    codes = packed_bytes(model)
    for layer in layers.values():
        layer.merge(adapter_names=["first", "second"])
    together = packed_bytes(model)
    for layer in layers.values():
        layer.unmerge()
        layer.merge(adapter_names=["first"])
        layer.merge(adapter_names=["second"])
        assert layer.merged_adapters == ["first", "second"]
    assert packed_bytes(model) == together
    for layer in layers.values():
        layer.unmerge()
    assert packed_bytes(model) == codes


def test_a_trained_bias_is_merged_and_taken_out() -> None:
    model = quantized("llama")
    layer = adapted("llama", model, target_modules=["q_proj"], lora_bias=True)["model.layers.0.self_attn.q_proj"]
    bias = layer.base_layer.bias.detach().clone()
    layer.merge()
    assert torch.allclose(layer.base_layer.bias, bias + layer.lora_B["default"].bias * layer.scaling["default"])
    layer.unmerge()
    assert torch.equal(layer.base_layer.bias, bias)


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_fails_changes_nothing(safe: bool) -> None:
    model = quantized("llama")
    layers = adapted("llama", model)
    codes = packed_bytes(model)
    layer = next(iter(layers.values()))
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN|finite"):
        layer.merge(safe_merge=safe)
    assert packed_bytes(model) == codes and not layer.merged


def test_tied_layers_stay_tied() -> None:
    model = quantized("llama_tied", quantize_embeddings=True)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["embed_tokens"]), model)
    perturb(model)
    layer = model.model.embed_tokens
    layer.merge()
    assert layer.base_layer.weight is model.lm_head.weight
    layer.unmerge()
    assert layer.base_layer.weight is model.lm_head.weight


def test_a_plain_module_merges_and_a_lone_layer_says_why_it_cannot() -> None:
    model = quantize(nn.Sequential(nn.Linear(32, 16), nn.ReLU()), RTNConfig(bits=4, group_size=16))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    perturb(model)
    layer = model[0]
    layer.merge()
    layer.unmerge()
    assert state_of(model) is not None
    del layer.base_layer.__dict__["_lowbit_config"]
    with pytest.raises(ValueError, match="recipe is unknown"):
        layer.merge()
