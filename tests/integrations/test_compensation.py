"""Compensation kept as an adapter: attached at once, saved beside the packed weights, attached again on loading."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

import hf_lowbit
from hf_lowbit import LowRankConfig, RTNConfig
from hf_lowbit.integrations.adapter_files import FOLDER
from hf_lowbit.nn import CorruptWeightError, PackedModule
from hf_lowbit.plan import PlanError, packed_modules
from tests.hub.fixture import Hub
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
NAMES = ["llama", "llama_tied", "gpt2", "whisper", "conditional_unet", "qwen3_moe", "mamba"]
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"quantize_embeddings": True},
    "llama_tied": {"quantize_embeddings": True},
    "qwen3_moe": {"modules_to_not_convert": ["experts"]},
    "mamba": {"modules_to_not_convert": ["out_proj"]},
}


def compensated(
    name: str, dtype: torch.dtype = torch.float32, rank: int = 3, keep: str = "adapter", **fields: Any
) -> Any:
    fields = {"bits": 3, **FIELDS.get(name, {}), **fields}
    return quantized(name, dtype, low_rank=LowRankConfig(rank, keep=keep), **fields)


def base_layers(model: nn.Module) -> dict[str, PackedModule]:
    return {name.removesuffix(".base_layer"): module for name, module in packed_modules(model).items()}


def applied_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> the weight a layer computes with, adapter or branch included."""
    weights = {}
    for name, module in base_layers(model).items():
        layer: Any = model.get_submodule(name)
        delta = layer.get_delta_weight("lowbit").float() if layer is not module else 0.0
        weights[name] = module.dequantized() + delta
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_attached_at_once_and_comes_back_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = compensated(name, dtype)
    parameters = dict(lora_parameters(model, "lowbit"))
    assert len(parameters) == 2 * len(base_layers(model))
    assert {p.dtype for p in parameters.values()} == {dtype} and not any(p.requires_grad for p in parameters.values())
    output = run(name, model)
    bare = quantized(name, dtype, bits=3, **FIELDS.get(name, {}))
    reference = run(name, load(name, checkpoint(name, dtype), dtype))
    assert relative_error(output, reference) < relative_error(run(name, bare), reference)
    assert packed_bytes(model) == packed_bytes(bare)

    model.save_pretrained(tmp_path)
    assert torch.equal(run(name, model), output)  # saving takes the layers out and puts them back
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {
        "config.json",
        "lowbit_report.json",
        f"{FOLDER}/adapter_config.json",
        f"{FOLDER}/adapter_model.safetensors",
    } <= files
    settings = json.loads((tmp_path / FOLDER / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 3, str(tmp_path))
    loaded = load(name, tmp_path, dtype)
    assert torch.equal(run(name, loaded), output)
    assert {n: p.tolist() for n, p in lora_parameters(loaded, "lowbit")} == {
        n: p.tolist() for n, p in parameters.items()
    }
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(run(name, load(name, tmp_path / "again", dtype)), output)


@pytest.mark.parametrize("keep", ["adapter", "branch"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "conditional_unet"])
def test_it_is_the_truncated_svd_of_what_rounding_lost(name: str, keep: str) -> None:
    model = compensated(name, keep=keep)
    originals = load(name, checkpoint(name))
    weights = applied_weights(model)
    assert weights
    for layer, module in base_layers(model).items():
        weight = originals.get_submodule(layer).weight.detach()
        lost = module.to_matrix("weight", weight) - module.to_matrix("weight", module.dequantized(branch=False))
        remaining = module.to_matrix("weight", weight) - module.to_matrix("weight", weights[layer])
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        assert remaining.norm() < lost.norm()
        assert torch.allclose(remaining.norm(), s[3:].norm(), rtol=1e-3)  # Eckart and Young
        assert relative_error(lost - remaining, u[:, :3] * s[:3] @ vh[:3]) < 0.01  # factors are bfloat16


@pytest.mark.parametrize("keep", ["adapter", "branch"])
def test_full_rank_gives_the_weights_back(keep: str) -> None:
    model = compensated(
        "llama", rank=32, bits=4, keep=keep, modules_to_not_convert=["mlp", "q_proj", "o_proj", "embed_tokens"]
    )
    originals = load("llama", checkpoint("llama"))
    for name, weight in applied_weights(model).items():
        assert relative_error(weight, originals.get_submodule(name).weight) < 1e-3  # 8 % without
    assert relative_error(run("llama", model), run("llama", originals)) < 1e-3


FRESH = """
import sys, torch, hf_lowbit
from tests.integrations.tiny_peft import load, run
for name in ("llama", "conditional_unet"):
    torch.save(run(name, load(name, f"{sys.argv[1]}/{name}", torch.bfloat16)), f"{sys.argv[1]}/{name}.pt")
"""


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    models = {name: compensated(name, torch.bfloat16) for name in ("llama", "conditional_unet")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    subprocess.run([sys.executable, "-c", FRESH, tmp_path], check=True)
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), run(name, model))


def test_the_folder_is_a_standard_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = compensated("llama")
    output = run("llama", model)
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "bare", ignore=shutil.ignore_patterns(FOLDER))
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        bare = load("llama", tmp_path / "bare")
    assert "computes WITHOUT it" in caplog.text and f'subfolder="{FOLDER}"' in caplog.text
    assert not torch.equal(run("llama", bare), output)
    attached = PeftModel.from_pretrained(bare, tmp_path / "model", subfolder=FOLDER)
    assert torch.equal(run("llama", attached), output)


def test_a_model_without_its_head_finds_its_layers(tmp_path: Path) -> None:
    model = compensated("llama", quantize_lm_head=True)
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    headless = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(headless(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_it_stays_active_and_frozen_under_adapters_of_the_user(tmp_path: Path) -> None:
    model = compensated("llama")
    output = run("llama", model)
    model.save_pretrained(tmp_path / "base")
    trained = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(run("llama", trained), output)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, _ in lora_parameters(trained, "default")
    }
    perturb(trained)
    adapted = run("llama", trained)
    trained.save_pretrained(tmp_path / "adapter")
    base = load("llama", tmp_path / "base")
    assert torch.equal(run("llama", PeftModel.from_pretrained(base, tmp_path / "adapter")), adapted)

    base = load("llama", tmp_path / "base")
    base.load_adapter(str(tmp_path / "adapter"), "mine")
    assert relative_error(run("llama", base), adapted) < 1e-5
    base.save_pretrained(tmp_path / "mine")  # transformers' own: only the user's
    assert not (tmp_path / "mine" / "config.json").exists()
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["r"] == 2
    base.delete_adapter("mine")
    assert torch.equal(run("llama", base), output)
    base.save_pretrained(tmp_path / "back")
    assert torch.equal(run("llama", load("llama", tmp_path / "back")), output)


def test_merged_away_or_deleted_it_is_no_longer_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(compensated("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    perturb(model)
    before = run("llama", model)
    merged = model.merge_and_unload()
    output = run("llama", merged)
    assert relative_error(output, before) < 0.6
    merged.save_pretrained(tmp_path / "merged")
    deleted = compensated("gpt2")
    deleted.save_pretrained(tmp_path / "deleted")
    deleted.delete_adapter("lowbit")
    bare = run("gpt2", deleted)
    deleted.save_pretrained(tmp_path / "deleted")
    assert not (tmp_path / "deleted" / FOLDER).exists()
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        assert torch.equal(run("llama", load("llama", tmp_path / "merged")), output)
        assert torch.equal(run("gpt2", load("gpt2", tmp_path / "deleted")), bare)
    assert not caplog.records


def test_dequantizing_folds_it_into_the_weights() -> None:
    for name in ("llama_tied", "gpt2", "conditional_unet"):
        model = compensated(name)
        output = run(name, model)
        hf_lowbit.dequantize(model)
        assert not list(lora_parameters(model, "lowbit")) and not packed_modules(model)
        assert relative_error(run(name, model), output) < 1e-4


def test_live_models_and_pipelines_get_it_too(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    config = RTNConfig(bits=3, group_size=16, low_rank=LowRankConfig(3, keep="adapter"))
    live = hf_lowbit.quantize(load("gpt2", checkpoint("gpt2")), config)
    live.save_pretrained(tmp_path / "live")
    assert torch.equal(run("gpt2", load("gpt2", tmp_path / "live")), run("gpt2", live))
    pipeline = DDPMPipeline(load("unet", checkpoint("unet")), DDPMScheduler())
    hf_lowbit.quantize(pipeline, config)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert list(lora_parameters(loaded.unet, "lowbit"))
    assert torch.equal(run("unet", loaded.unet), run("unet", pipeline.unet))


def test_what_peft_cannot_adapt_is_refused_before_any_weight_is_read() -> None:
    for name, reason in (("qwen3_moe", "experts"), ("mamba", "out_proj")):
        with pytest.raises(PlanError, match=f'{reason}.*keep="branch"'):
            compensated(name, modules_to_not_convert=None)
    for convolution in (
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv1d(16, 16, 3, dilation=2),
        nn.Conv1d(8, 8, 3, padding_mode="circular"),
    ):
        with pytest.raises(PlanError, match='keep="branch"'):
            hf_lowbit.quantize(nn.Sequential(convolution), RTNConfig(low_rank=LowRankConfig(2, keep="adapter")))


def test_a_plain_module_is_refused_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    weight = model[0].weight
    with pytest.raises(ValueError, match='keep="branch"'):
        hf_lowbit.quantize(model, RTNConfig(group_size=16, low_rank=LowRankConfig(2, keep="adapter")))
    assert model[0].weight is weight


@pytest.mark.parametrize("damage", ["truncated", "other", "settings"])
def test_a_damaged_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    compensated("llama").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / FOLDER / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other":
        compensated("llama", rank=2).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / FOLDER / weights.name, weights)
    else:
        (weights.parent / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptWeightError, match=r"adapter|lowbit"):
        load("llama", tmp_path / "model")


def test_training_it_moves_it_and_saving_keeps_every_bit(tmp_path: Path) -> None:
    model = compensated("llama")
    codes = packed_bytes(model)
    model.set_adapter("lowbit")
    before = {n: p.detach().clone() for n, p in lora_parameters(model, "lowbit")}
    assert all(p.requires_grad for _, p in lora_parameters(model, "lowbit"))
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 250, (8, 16))]
    Trainer(model, arguments, train_dataset=data).train()
    assert all(not torch.equal(p, before[n]) for n, p in lora_parameters(model, "lowbit"))
    assert packed_bytes(model) == codes
    output = run("llama", model)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(run("llama", load("llama", tmp_path / "model")), output)
    assert torch.equal(run("llama", load("llama", tmp_path / "run" / "checkpoint-2")), output)


TOKENS = [{"input_ids": torch.arange(24).reshape(1, 24) * step % 250} for step in (1, 3, 7, 11)]


def weighted(metric: str = "full", **fields: Any) -> Any:
    """A llama whose compensation is weighted by its inputs, with ranks of its layers' own."""
    part = LowRankConfig(4, metric=metric, keep="adapter")
    overrides = {"down_proj": {"low_rank": 2}, "k_proj": {"low_rank": 0}}
    return quantized(
        "llama", low_rank=part, overrides=overrides, dataset=TOKENS, num_samples=4, **{"bits": 2, **fields}
    )


@pytest.mark.parametrize("metric", ["mean_abs", "diag", "full"])
def test_every_metric_can_be_kept_as_an_adapter(metric: str, tmp_path: Path) -> None:
    model = weighted(metric)
    output = run("llama", model)
    shapes = {n.rpartition(".lora_A")[0].rpartition(".")[2]: p.shape[0] for n, p in lora_parameters(model, "lowbit")
              if ".lora_A" in n}  # fmt: skip
    assert shapes["down_proj"] == 2 and shapes["q_proj"] == 4 and "k_proj" not in shapes
    scalings = [layer.scaling for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    assert len(scalings) == len(shapes) * 2 and all(scaling["lowbit"] == 1 for scaling in scalings)
    model.save_pretrained(tmp_path)
    assert torch.equal(run("llama", load("llama", tmp_path)), output)


def test_plain_peft_code_does_not_add_it_twice(tmp_path: Path) -> None:
    """``PeftModel.from_pretrained`` on a base that has brought it along: it takes its place, trainable on demand."""
    model = weighted()
    output = run("llama", model)
    model.save_pretrained(tmp_path / "base")
    base = load("llama", tmp_path / "base")
    trained = PeftModel.from_pretrained(base, tmp_path / "base" / FOLDER, is_trainable=True)
    assert torch.equal(run("llama", trained), output)
    assert len(list(lora_parameters(trained, "default"))) == sum(p.requires_grad for p in trained.parameters()) > 0
    perturb(trained)
    moved = run("llama", trained)
    trained.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(load("llama", tmp_path / "base"), tmp_path / "trained")
    assert torch.equal(run("llama", again), moved)


def test_tied_tables_are_packed_on_loading_too(tmp_path: Path) -> None:
    """With data the float model is loaded first, and its ties are those of floats."""
    part = LowRankConfig(4, metric="full")
    model = quantized("llama_tied", low_rank=part, quantize_embeddings=True, dataset=TOKENS, num_samples=4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(run("llama_tied", load("llama_tied", tmp_path)), run("llama_tied", model))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    weighted().save_pretrained(tmp_path / "model")
    weighted(bits=3).save_pretrained(tmp_path / "other")
    shutil.rmtree(tmp_path / "model" / FOLDER)
    shutil.copytree(tmp_path / "other" / FOLDER, tmp_path / "model" / FOLDER)
    with pytest.raises(CorruptWeightError, match=r"made for another base: .*_proj has other codes"):
        load("llama", tmp_path / "model")


PUSH = """
import hf_lowbit
from tests.integrations.test_compensation import compensated
from tests.integrations.hub_scripts import sha256
from tests.integrations.tiny_peft import run
for name in ("llama", "conditional_unet"):
    model = compensated(name)
    model.push_to_hub(f"acme/compensated-{name}")
    print(sha256(run(name, model)))
"""
PULL = """
import diffusers, hf_lowbit, transformers
from tests.integrations.hub_scripts import sha256
from tests.integrations.tiny_peft import TINY, run
for name in ("llama", "conditional_unet"):
    auto = getattr(transformers, TINY[name].auto, None) or getattr(diffusers, TINY[name].auto)
    print(sha256(run(name, auto.from_pretrained(f"acme/compensated-{name}"))))
"""


def test_it_travels_through_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    pushed = hub.python(PUSH).splitlines()[-2:]
    assert hub.python(PULL).splitlines()[-2:] == pushed
    api = HfApi(endpoint=hub.url, token=hub.token)
    for repo in ("acme/compensated-llama", "acme/compensated-conditional_unet"):
        settings = Path(api.hf_hub_download(repo, f"{FOLDER}/adapter_config.json", cache_dir=tmp_path))
        assert json.loads(settings.read_text())["base_model_name_or_path"] == repo
