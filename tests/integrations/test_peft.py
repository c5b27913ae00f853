"""LoRA on packed modules: what PEFT promises on float ones, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lowbit
from hf_lowbit.integrations.peft import register_all
from hf_lowbit.integrations.peft_layers import LORA_LAYERS
from hf_lowbit.nn import PackedModule
from tests.integrations.tiny_peft import (
    checkpoint,
    load,
    lora_parameters,
    packed_bytes,
    perturb,
    quantized,
    relative_error,
    run,
)

DTYPES = [torch.float32, torch.bfloat16]
TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],  # linear, embedding
    "gpt2": ["c_attn", "c_fc"],  # transformers' Conv1D
    "whisper": ["q_proj", "fc1", "conv1", "conv2"],  # one-dimensional convolution
    "qwen3_moe": ["q_proj", "o_proj"],  # attention beside packed experts
    "mamba": ["in_proj", "x_proj"],
    "conditional_unet": ["to_q", "to_k", "conv1", "conv_shortcut", "proj_in"],  # linear, 3 x 3 and 1 x 1 convolution
}


def adapted(name: str, model: Any, adapter: str = "default", **fields: Any) -> Any:
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS[name], **fields})
    if name.endswith("unet"):
        model.add_adapter(config, adapter)
        return model
    return get_peft_model(model, config, adapter)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, tuple(LORA_LAYERS.values()))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TARGETS)
def test_a_new_adapter_changes_nothing_and_a_trained_one_is_lora_on_the_decoded_weight(
    name: str, dtype: torch.dtype
) -> None:
    model = quantized(name, dtype, quantize_embeddings=name == "llama")
    before = run(name, model)
    model = adapted(name, model, use_rslora=True, init_lora_weights=name != "gpt2" or "gaussian")
    if name != "conditional_unet":  # its embedding of no adapter is the base to the last bit
        assert torch.equal(run(name, model), before)
    assert {parameter.dtype for _, parameter in lora_parameters(model, "default")} == {torch.float32}
    layers = adapted_layers(model)
    assert layers and all(layer.scaling == {"default": 8 / math.sqrt(4)} for layer in layers.values())
    perturb(model)
    output = run(name, model)
    assert relative_error(output, before) > 0.01
    for layer in layers.values():
        layer.base_layer = layer.base_layer.to_float(dtype)
    assert relative_error(output, run(name, model)) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "conditional_unet"])
def test_dora_is_dora_on_the_decoded_weight(name: str) -> None:
    model = quantized(name, quantize_embeddings=name == "llama")
    before = run(name, model)
    model = adapted(name, model, use_dora=True)
    assert relative_error(run(name, model), before) < 1e-5
    perturb(model)
    output = run(name, model)
    inputs = {"input_ids": torch.arange(8)[None]} if name in ("llama", "gpt2") else None
    if inputs:
        model.train()
        model(**inputs).logits.square().mean().backward()
        assert all(p.grad is not None for _, p in lora_parameters(model, "default"))
    for layer in adapted_layers(model).values():
        layer.base_layer = layer.base_layer.to_float(torch.float32)
    assert relative_error(output, run(name, model)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "qwen3_moe"])
def test_a_saved_adapter_comes_back_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(name, quantized(name, dtype))
    perturb(model)
    expected = run(name, model)
    model.save_pretrained(tmp_path)
    base = quantized(name, dtype)
    assert torch.equal(run(name, PeftModel.from_pretrained(base, tmp_path)), expected)

    other = quantized(name, dtype)
    other.load_adapter(str(tmp_path), "mine")
    assert relative_error(run(name, other), expected) < (1e-6 if dtype == torch.float32 else 0.02)
    other.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "config.json").exists()  # transformers' own: the adapter alone
    assert (tmp_path / "mine" / "adapter_model.safetensors").exists()
    other.delete_adapter("mine")
    other.save_pretrained(tmp_path / "base")
    assert torch.equal(run(name, load(name, tmp_path / "base", dtype)), run(name, quantized(name, dtype)))


def test_an_adapter_of_the_float_model_fits_the_packed_one(tmp_path: Path) -> None:
    model = get_peft_model(load("gpt2", checkpoint("gpt2")), LoraConfig(r=4, target_modules="all-linear"))
    perturb(model, scale=0.02)
    model.save_pretrained(tmp_path)
    packed = PeftModel.from_pretrained(quantized("gpt2", bits=8), tmp_path)
    assert packed.peft_config["default"].fan_in_fan_out
    assert relative_error(run("gpt2", packed), run("gpt2", model)) < 0.02


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("gpt2", 8), ("whisper", 32)])
def test_all_linear_finds_every_packed_linear_layer_but_the_head(name: str, count: int) -> None:
    model = get_peft_model(quantized(name), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    layers = adapted_layers(model)
    assert len(layers) == count and all(isinstance(layer.base_layer, PackedModule) for layer in layers.values())


def test_diffusers_loads_its_lora_files_onto_packed_models(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    float_model: UNet2DConditionModel = load("conditional_unet", checkpoint("conditional_unet"))
    float_model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["conditional_unet"]), "style")
    perturb(float_model, "style")
    float_model.save_lora_adapter(tmp_path, "style", weight_name="style.safetensors")
    model = quantized("conditional_unet", bits=8)
    before = run("conditional_unet", model)
    model.load_lora_adapter(tmp_path, adapter_name="style", prefix=None, weight_name="style.safetensors")
    output = run("conditional_unet", model)
    assert relative_error(output, before) > 0.05
    assert relative_error(output, run("conditional_unet", float_model)) < 0.05
    model.save_lora_adapter(tmp_path / "saved", "style")
    again = quantized("conditional_unet", bits=8)
    again.load_lora_adapter(tmp_path / "saved", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(run("conditional_unet", again), output)
    model.disable_adapters()
    assert torch.equal(run("conditional_unet", model), before)
    model.save_pretrained(tmp_path / "base")  # the packed base, without the style
    assert torch.equal(run("conditional_unet", load("conditional_unet", tmp_path / "base")), before)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "mica", "orthogonal"])
def test_initialisations_from_the_float_weight_are_refused(init: str) -> None:
    fields = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' .* low_rank=LowRankConfig"):
        adapted("llama", quantized("llama"), init_lora_weights=init, target_modules=["q_proj"], **fields)


def test_variants_that_rewrite_the_base_are_refused() -> None:
    from peft import KasaConfig

    with pytest.raises(ValueError, match="unsupported variant"):
        adapted("llama", quantized("llama"), kasa_config=KasaConfig())


def test_target_parameters_on_packed_weights_are_refused() -> None:
    for parameter in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"):
        with pytest.raises(ValueError, match=r"target_parameters names .* hf_lowbit has packed"):
            get_peft_model(quantized("qwen3_moe"), LoraConfig(r=2, target_parameters=[parameter]))
    with pytest.raises(ValueError, match='"all-linear"'):  # which covers the experts
        get_peft_model(quantized("qwen3_moe"), LoraConfig(r=2, target_modules="all-linear"))
    model = quantized("qwen3_moe", modules_to_not_convert=["experts"])
    model = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"]))
    before = run("qwen3_moe", model)
    perturb(model)
    assert not torch.equal(run("qwen3_moe", model), before)  # left in full precision, PEFT adapts them


def test_what_peft_refuses_stays_refused() -> None:
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(quantized("mamba"), LoraConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(quantized("qwen3_moe"), LoraConfig(r=2, target_modules=["experts"]))


def test_registering_twice_is_harmless() -> None:
    import peft.tuners.lora.model as lora_model

    before = lora_model.dispatch_default
    register_all()
    assert lora_model.dispatch_default is before


def text_data(count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 250, (count, 16))]


def speech_data(dtype: torch.dtype, count: int = 8) -> list[dict[str, torch.Tensor]]:
    features = torch.randn(count, 16, 60).to(dtype)
    return [
        {"input_features": x, "labels": ids} for x, ids in zip(features, torch.randint(3, 250, (count, 6)), strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "qwen3_moe"])
def test_the_trainer_moves_the_adapter_and_nothing_else(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = hf_lowbit.prepare_for_training(quantized(name, dtype))
    assert model.is_activation_checkpointing and not any(p.requires_grad for p in model.parameters())
    floats = {n: p.detach().clone() for n, p in model.named_parameters() if p.is_floating_point()}
    codes = packed_bytes(model)
    model = adapted(name, model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=speech_data(dtype) if name == "whisper" else text_data())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert all(p.abs().max() > 0 for n, p in lora_parameters(model, "default") if "lora_B" in n)
    assert packed_bytes(model) == codes
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[n], value) for n, value in floats.items())


def test_diffusers_models_are_prepared_and_trained() -> None:
    model = hf_lowbit.prepare_for_training(quantized("conditional_unet"))
    codes = packed_bytes(model)
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS["conditional_unet"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in lora_parameters(model, "default")
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    text, target = torch.randn(1, 7, 32), torch.randn(1, 4, 16, 16)
    losses = []
    for _ in range(3):
        loss = (model(target, 3, text).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0] and packed_bytes(model) == codes


def test_preparing_keeps_types_but_float16() -> None:
    model = hf_lowbit.prepare_for_training(quantized("llama", torch.bfloat16), gradient_checkpointing=False)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert not model.is_activation_checkpointing
    model = quantized("llama", torch.float16, quantize_embeddings=True)
    before = run("llama", model).float()
    model = hf_lowbit.prepare_for_training(model)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert relative_error(run("llama", model), before) < 0.01


def test_preparing_spares_adapters_and_needs_a_quantized_model() -> None:
    model = adapted("llama", quantized("llama"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        trainable
        and {n for n, p in hf_lowbit.prepare_for_training(model).named_parameters() if p.requires_grad} == trainable
    )
    with pytest.raises(ValueError, match="quantized by hf_lowbit"):
        hf_lowbit.prepare_for_training(nn.Linear(2, 2))
