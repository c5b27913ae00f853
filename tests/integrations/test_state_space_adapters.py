"""LoRA on quantized mixers, what merging, dequantizing and compiling make of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.config import ConfigError
from hf_lowbit.nn import CorruptWeightError, PackedMixer, PackedModule
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit_quamba import QuambaConfig
from hf_lowbit_quamba2 import Quamba2Config
from tests.integrations.tiny_peft import lora_parameters, packed_bytes, perturb
from tests.integrations.tiny_state_space import TINY, config_of, loaded, mixers_of, packed_floats, relative, tokens

# One of each kind of forward: without norms, with them, and Mamba-2 with its multipliers.
SOME = ["mamba", "falcon_mamba", "mamba2", "falcon_h1"]


@pytest.fixture(params=TINY)
def name(request: Any) -> str:
    return str(request.param)


def adapted(name: str, model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=list(TINY[name].lora), task_type="CAUSAL_LM"))


@torch.no_grad()
def logits(model: Any, x: Tensor) -> Tensor:
    result: Tensor = model(x, use_cache=False).logits
    return result


def test_a_new_adapter_changes_nothing_and_a_trained_one_is_kept(name: str, tmp_path: Path) -> None:
    model, x = loaded(name), tokens(2, 11)
    before = logits(model, x)
    model = adapted(name, model)
    assert len(model.targeted_module_names) == len(TINY[name].lora) * sum(
        isinstance(module, PackedMixer) for module in model.modules()
    )
    assert relative(logits(model, x), before) < 1e-5
    perturb(model)
    after = logits(model, x)
    assert relative(after, before) > 0.01
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(name), tmp_path).eval()
    assert torch.equal(logits(again, x), after)


def test_training_lowers_the_loss_and_leaves_the_codes(name: str) -> None:
    model = adapted(name, hf_lowbit.prepare_for_training(loaded(name), gradient_checkpointing=False))
    codes = packed_bytes(model)
    parameters = [parameter for _, parameter in lora_parameters(model, "default")]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    x = (torch.arange(12)[None] + torch.tensor([[0], [5]])) % 7 + 3
    losses = []
    for _ in range(6):
        loss = model.train()(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert packed_bytes(model) == codes


@pytest.mark.parametrize("name", SOME)
def test_a_merged_adapter_is_in_the_codes(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, x = adapted(name, loaded(name)), tokens(2, 11)
    perturb(model, scale=0.02)
    expected = logits(model.eval(), x)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, x), expected) < 0.25
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, x), logits(merged, x))


def test_dequantizing_gives_the_librarys_mixers_back(name: str) -> None:
    """Of the same class, with every weight that the codes stand for, and none of ours."""
    model, x = loaded(name), tokens(2, 13)
    expected = logits(model, x)
    weights = {
        f"{key}.{parameter}": module.dequantized(parameter)
        for key, module in packed_modules(model).items()
        for parameter in module.packed_parameters
    }
    hf_lowbit.dequantize(model)
    assert not [module for module in model.modules() if isinstance(module, PackedModule)]
    stock = TINY[name].create()
    found, originals = mixers_of(model, TINY[name].mixer), mixers_of(stock, TINY[name].mixer)
    assert list(found) == list(originals)
    for key, mixer in found.items():
        assert type(mixer) is type(originals[key])
        assert mixer.state_dict().keys() == originals[key].state_dict().keys()
        buffers = dict(originals[key].named_buffers())
        for buffer, value in mixer.named_buffers():  # norms without weights, multipliers
            assert torch.equal(value, buffers[buffer]), buffer
    state = model.state_dict()
    assert weights and all(torch.equal(state[key], weight) for key, weight in weights.items())
    assert relative(logits(model, x), expected) < 0.25  # inputs are not quantized any more


@pytest.mark.parametrize("name", ["mamba", "zamba2"])
def test_an_adapter_of_the_convolution_is_refused_when_it_would_be_passed_over(name: str) -> None:
    from peft import inject_adapter_in_model

    model = loaded(name)
    mixer = next(module for module in model.modules() if isinstance(module, PackedMixer))
    wrapped = nn.ModuleDict({"conv1d": mixer.conv1d})
    inject_adapter_in_model(LoraConfig(r=wrapped["conv1d"].groups, target_modules=["conv1d"]), wrapped)
    mixer.conv1d = wrapped["conv1d"]
    with pytest.raises(ValueError, match="conv1d is wrapped"):
        logits(model, tokens(1, 5))


def test_sequences_in_a_row_are_refused() -> None:
    mixer = next(module for module in loaded("bamba").modules() if isinstance(module, PackedMixer))
    x = torch.zeros(1, 4, mixer.in_proj.in_features)
    with pytest.raises(ValueError, match="seq_idx"):
        mixer(x, seq_idx=torch.zeros(1, 4, dtype=torch.int32))


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_compiles_without_a_break(name: str) -> None:
    """Prefill and a decoding step, in one graph each."""
    from transformers import DynamicCache

    model = loaded(name)
    mixer = next(module for module in model.modules() if isinstance(module, PackedMixer))
    x = torch.randn(1, 9, mixer.in_proj.in_features, generator=torch.Generator().manual_seed(4))
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=False)
    assert relative(compiled(x), mixer(x)) < 1e-5
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        mixer(x, cache)
    one = x[:, :1]
    assert relative(compiled(one, caches[0]), mixer(one, caches[1])) < 1e-5
    for read in ("get_conv_state", "get_recurrent_state"):
        codes = [getattr(cache, read)(mixer.layer_idx) for cache in caches]
        assert torch.equal(*codes)


def zamba() -> Any:
    from transformers import ZambaConfig, ZambaForCausalLM

    layers = {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "mamba_d_state": 8}
    return ZambaForCausalLM(ZambaConfig(**sizes, **layers, n_mamba_heads=2))


DATA = [{"input_ids": tokens(2, 8) % 60}]


@pytest.mark.parametrize("config", [QuambaConfig(any_generation=True), Quamba2Config()], ids=["quamba", "quamba2"])
def test_unsupported_mixers_are_refused_by_name(config: Any) -> None:
    """A model of none but these: nothing is touched, and the error names class and reason."""
    model = zamba()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanError, match="ZambaMambaMixer"):
        hf_lowbit.quantize(model, config, data=DATA)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("config", [QuambaConfig(), Quamba2Config()], ids=["quamba", "quamba2"])
def test_a_model_without_mixers_is_refused(config: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    with pytest.raises(PlanError, match="LlamaForCausalLM"):
        hf_lowbit.quantize(model, config, data=DATA)


def test_an_activation_that_is_no_silu_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8, hidden_act="gelu")
    with pytest.raises(PlanError, match="gelu"):
        hf_lowbit.quantize(MambaForCausalLM(config), QuambaConfig(), data=DATA)


def test_the_wrong_generation_is_refused_by_name() -> None:
    for name, tiny in TINY.items():
        if tiny.generation == 2:
            with pytest.raises(PlanError, match="Quamba2Config"):
                hf_lowbit.quantize(tiny.create(), QuambaConfig(), data=DATA)
        else:
            with pytest.raises(PlanError, match="head_clusters"):
                hf_lowbit.quantize(tiny.create(), Quamba2Config(head_clusters=2, channel_clusters=2), data=DATA)
        assert name


@pytest.mark.parametrize(("fields", "problem"), [
    ({"head_clusters": 3, "channel_clusters": 2}, "head_clusters"),  # two heads per group
    ({"head_clusters": 2, "channel_clusters": 17}, "channel_clusters"),  # sixteen channels per head
])  # fmt: skip
@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.generation == 2])
def test_clusters_that_do_not_fit_are_refused(name: str, fields: dict[str, int], problem: str) -> None:
    with pytest.raises((PlanError, ConfigError), match=problem):
        hf_lowbit.quantize(TINY[name].create(), config_of(name, **fields), data=DATA)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.is_hybrid])
def test_the_rest_of_a_hybrid_stays_float_and_is_reported(name: str) -> None:
    model = loaded(name)
    report = hf_lowbit.report(model)
    others = {key: why for key, why in report.skipped.items() if key.rpartition(".")[2] in ("q_proj", "down_proj")}
    assert others and all("not part of a state-space mixer" in why for why in others.values())
    assert all(type(model.get_submodule(key)) is nn.Linear for key in others)


def test_weights_of_a_damaged_mixer_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    loaded("mamba").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if key.endswith("site_x_scale"))
    tensors[key] = torch.full_like(tensors[key], -1)  # NaN
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptWeightError, match="site_x_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_state_dict_of_unpacked_mixers_is_the_librarys(name: str) -> None:
    """Checkpoints of floats load into them under their own names."""
    stock = TINY[name].create()
    expected = {key: value.clone() for key, value in stock.state_dict().items()}
    packed = packed_floats(stock).state_dict()
    assert packed.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in packed.items())
