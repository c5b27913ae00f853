"""quantize(): live models, names, refusals; the same result as quantizing on loading; all or nothing."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit import ConfigError, LowRankConfig, RTNConfig, quantization
from hf_lowbit.nn import PackedEmbedding, PackedLinear
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit.tensorwise import QuantizationError


def tiny_llama(**values: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **values})).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "llama"
    tiny_llama(tie_word_embeddings=request.param).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Net(nn.Module):
    """A plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Forward."""
        return self.head(self.body(x))


CONFIGS = {
    "default": RTNConfig(group_size=16),
    "ends": RTNConfig(group_size=16, quantize_embeddings=True, quantize_lm_head=True, bits=8),
    "overrides": RTNConfig(
        format="nf", group_size=None, overrides={"layers.0": {"bits": 3}, "down_proj": {"format": "ternary"}}
    ),
    "zero points": RTNConfig(group_size=16, symmetric=False, modules_to_not_convert=["q_proj"]),
    "activations": RTNConfig(group_size=16, activation_bits=8),
    "branch": RTNConfig(group_size=16, bits=2, low_rank=LowRankConfig(4)),
    "fitted": RTNConfig(format="codebook", bits=3, group_size=16),
}
TOKENS = torch.arange(12)[None]


@pytest.mark.parametrize("name", CONFIGS)
def test_live_quantization_equals_quantization_on_loading(name: str, checkpoint: Path) -> None:
    live = hf_lowbit.quantize(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"), CONFIGS[name])
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", quantization_config=CONFIGS[name])
    mine, theirs = live.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    assert live.config.quantization_config.plan == loaded.config.quantization_config.plan
    with torch.no_grad():
        assert torch.equal(live(TOKENS).logits, loaded(TOKENS).logits)
    errors = [(layer.name, layer.error) for layer in hf_lowbit.report(live).layers]
    assert errors == [(layer.name, layer.error) for layer in hf_lowbit.report(loaded).layers]


def test_a_folder_is_the_same_as_from_pretrained(checkpoint: Path) -> None:
    by_folder = hf_lowbit.quantize(checkpoint, CONFIGS["default"])
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", quantization_config=CONFIGS["default"])
    assert type(by_folder) is LlamaForCausalLM
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in by_folder.state_dict().items())


def test_quantization_is_in_place_and_approximate() -> None:
    net, x = Net().eval(), torch.randn(5, 32)
    exact = net(x)
    result = hf_lowbit.quantize(net, RTNConfig(bits=8, group_size=None))
    assert result is net
    assert set(packed_modules(net)) == {"body.0", "body.2", "head"}
    assert 0 < (net(x) - exact).norm() < 0.02 * exact.norm()


def test_a_methods_name_stands_for_its_defaults() -> None:
    named, configured = (hf_lowbit.quantize(seeded_net(), config) for config in ("rtn", RTNConfig()))
    assert all(torch.equal(tensor, configured.state_dict()[key]) for key, tensor in named.state_dict().items())


def seeded_net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_the_users_config_stays_as_it_was() -> None:
    config = RTNConfig(group_size=16)
    before = copy.deepcopy(config)
    hf_lowbit.quantize(Net(), config)
    assert config == before


@pytest.mark.parametrize(
    ("config", "answer"),
    [("gptqq", "unknown method 'gptqq'; did you mean 'gptq'"), ("", "unknown method ''; installed: .*rtn")],
)
def test_an_unknown_method_is_refused_and_the_installed_ones_named(config: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        hf_lowbit.quantize(Net(), config)


@pytest.mark.parametrize("config", [None, {"bits": 4}, RTNConfig])
def test_something_else_than_a_config_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="config must be a method's config or its name"):
        hf_lowbit.quantize(Net(), config)


@pytest.mark.parametrize("target", [3, None, {"model": 1}])
def test_something_else_than_a_model_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="a module, pipeline, folder or repository is needed"):
        hf_lowbit.quantize(target, "rtn")


def test_components_belong_to_pipelines(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="is not a pipeline"):
        hf_lowbit.quantize(checkpoint, "rtn", components=["unet"])


def test_an_already_quantized_model_is_refused() -> None:
    net = hf_lowbit.quantize(Net(), "rtn")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(QuantizationError, match="quantized already; dequantize it first"):
        hf_lowbit.quantize(net, "rtn")
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"), pytest.raises(QuantizationError, match="meta device"):
        hf_lowbit.quantize(Net(), "rtn")


# all or nothing
def snapshot(model: nn.Module) -> dict[str, Any]:
    modules = {f"module {name}": id(module) for name, module in model.named_modules()}
    return {**modules, **{name: (id(parameter), parameter.clone()) for name, parameter in model.named_parameters()}}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, value in before.items():
        if name.startswith("module"):
            assert after[name] == value
        else:
            assert after[name][0] == value[0] and torch.equal(after[name][1].nan_to_num(), value[1].nan_to_num())
    assert not packed_modules(model)


@pytest.mark.parametrize("make", [Net, tiny_llama])
def test_a_nan_weight_leaves_the_model_untouched_and_is_named(make: Any) -> None:
    model = make()
    name, weight = [(n, p) for n, p in model.named_parameters() if p.dim() == 2 and "head" not in n][-1]
    weight.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(QuantizationError, match=f"^{name}: the weight holds NaN"):
        hf_lowbit.quantize(model, RTNConfig(group_size=16, quantize_lm_head=True))
    assert_untouched(model, before)
    with torch.no_grad():
        weight.data[0, 0] = 0.0
    hf_lowbit.quantize(model, RTNConfig(group_size=16))  # and nothing stands in the way of another attempt


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interruption_leaves_the_model_untouched(
    interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = Net(), []
    original = quantization.quantize_parameter

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise interruption
        original(*args)

    monkeypatch.setattr(quantization, "quantize_parameter", interrupted)
    before = snapshot(model)
    with pytest.raises(interruption):
        hf_lowbit.quantize(model, "rtn")
    assert_untouched(model, before)


def test_a_rank_that_exceeds_a_layer_is_named() -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"^head: low_rank.rank=16 exceeds the smaller side of its 8 x 32 matrix"):
        hf_lowbit.quantize(model, RTNConfig(low_rank=LowRankConfig(16)))
    assert_untouched(model, before)


def test_strict_groups_refuse_before_anything_changes() -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"body.0: group_size=20"):
        hf_lowbit.quantize(model, RTNConfig(group_size=20, strict_groups=True))
    assert_untouched(model, before)


# shared weights and modules
class Shared(nn.Module):
    """One weight in an embedding and a head, one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.head.weight = self.embed.weight
        self.first = nn.Linear(32, 32)
        self.again = self.first

    def forward(self, tokens: Tensor) -> Tensor:
        """Forward."""
        return self.head(self.again(self.first(self.embed(tokens))))


def test_shared_weights_are_packed_once() -> None:
    model = hf_lowbit.quantize(Shared(), RTNConfig(bits=8, quantize_embeddings=True))
    assert isinstance(model.embed, PackedEmbedding) and isinstance(model.head, PackedLinear)
    assert model.embed.weight is model.head.weight and model.embed.weight_scale is model.head.weight_scale
    assert model.again is model.first and isinstance(model.first, PackedLinear)
    report = hf_lowbit.report(model)
    assert {layer.name: layer.tied_to for layer in report.layers if layer.tied_to} == {"head.weight": "embed.weight"}
    assert report.elements == 40 * 32 + 32 * 32


def test_shared_weights_stay_shared_when_they_are_skipped() -> None:
    model = hf_lowbit.quantize(Shared(), RTNConfig())
    assert model.embed.weight is model.head.weight and model.embed.weight.is_floating_point()


def test_a_shared_module_is_restored_in_both_places() -> None:
    model = Shared()
    model.first.weight.data[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(QuantizationError, match=r"first.weight"):
        hf_lowbit.quantize(model, "rtn")
    assert_untouched(model, before)
    assert model.again is model.first


# what is told
def test_the_report_accounts_for_everything() -> None:
    model = hf_lowbit.quantize(Net(), RTNConfig(bits=4, group_size=16, modules_to_not_convert=["head"]))
    report = hf_lowbit.report(model)
    weights, scales = 2 * 32 * 48, 2 * 32 * 48 // 16
    assert report.packed_bytes == weights // 2 + 2 * scales
    assert report.bits_per_weight == 4 + 16 / 16
    assert all(0.05 < layer.error < 0.2 for layer in report.layers)
    assert report.skipped == {"head": "modules_to_not_convert names 'head'"}
    assert report.original_bits == 32 and report.seconds >= 0


def test_regrouping_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_lowbit"):
        hf_lowbit.quantize(Net(), RTNConfig(group_size=32))
    assert "group_size=32 does not divide the input width 48, groups of 24 instead" in caplog.text


def test_provenance_and_plan_are_recorded_without_the_data() -> None:
    model = hf_lowbit.quantize(Net(), RTNConfig(seed=5), data=["private"])
    from hf_lowbit.state import state_of

    state = state_of(model)
    assert state is not None
    assert state.config.provenance["seed"] == 5 and "torch" in state.config.provenance["versions"]
    assert [entry["kind"] for entry in state.config.plan or []] == ["linear"] * len(state.config.plan or [])
    assert "private" not in state.config.to_json_string(use_diff=False)
