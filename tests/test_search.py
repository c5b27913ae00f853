"""search_bits finds a config whose quantized model meets the budget, and spends it where it matters."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.allocation import AllocationError
from hf_lowbit.config import ConfigError
from hf_lowbit.search import METRICS, SearchResult, search, search_bits
from tests.matrix.models import MODELS

BUDGETS = (2.6, 3.25, 4.3, 6.01)


def tiny(name: str = "llama") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    batch = {key: value if isinstance(value, Tensor) else torch.tensor([value]) for key, value in inputs(name).items()}
    return model, [batch] * 2


def inputs(name: str) -> dict[str, Any]:
    return MODELS[name].inputs(torch.float32)


def config(**fields: Any) -> hf_lowbit.LowbitConfig:
    return hf_lowbit.RTNConfig(**{"group_size": 32, "num_samples": 2, **fields})


def bits_of(result: SearchResult) -> dict[str, int]:
    return {name: group.bits for group in result.groups for name in group.layers}


def assert_spent(result: SearchResult) -> None:
    """At most the budget, and no group could have one more step of what is left that makes it better."""
    elements = sum(group.elements for group in result.groups)
    left = result.budget * elements - sum(group.stored_bits for group in result.groups)
    assert left >= 0
    for group in result.groups:
        wider = [bits for bits, loss in group.losses.items() if bits > group.bits and loss < group.loss]
        assert not wider or (min(wider) - group.bits) * group.elements > left


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_quantized_model_meets_the_budget(metric: str, budget: float) -> None:
    model, data = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = search(model, config(), data, budget, metric=metric)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_spent(result)
    report = hf_lowbit.report(hf_lowbit.quantize(model, result.config))
    assert report.bits_per_weight == result.bits_per_weight <= budget
    assert {layer.name.removesuffix(".weight"): layer.bits for layer in report.layers} == bits_of(result)


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_searched(name: str) -> None:
    model, data = tiny(name)
    result = search(model, config(symmetric=False, quantize_embeddings=name != "unet"), data, 3.9)
    assert_spent(result)
    report = hf_lowbit.report(hf_lowbit.quantize(model, result.config))
    assert report.bits_per_weight == result.bits_per_weight


@pytest.mark.parametrize("method", ["GPTQConfig", "AWQConfig", "HQQConfig"])
def test_other_methods_quantize_with_what_was_found(method: str) -> None:
    model, data = tiny()
    given = getattr(hf_lowbit, method)(group_size=32, num_samples=2, low_rank={"rank": 2})
    found = search_bits(model, given, data, 5.5, rounding="method")
    assert type(found) is type(given) and given.overrides is None
    report = hf_lowbit.report(hf_lowbit.quantize(model, found, data))
    assert report.bits_per_weight <= 5.5 and len({layer.bits for layer in report.layers}) > 1
    assert type(found).from_dict(found.to_dict()).same_request(found)


def test_an_exponent_that_is_searched_is_found_by_the_method() -> None:
    model, data = tiny()
    result = search(model, hf_lowbit.NUPESConfig(group_size=None, num_samples=2), data, 3.7)
    report = hf_lowbit.report(hf_lowbit.quantize(model, result.config, data))
    assert report.bits_per_weight == result.bits_per_weight <= 3.7


@pytest.mark.parametrize("metric", METRICS)
def test_layers_that_kernels_fuse_share_bits(metric: str) -> None:
    model, data = tiny()
    for budget in BUDGETS:
        bits = bits_of(search(model, config(), data, budget, metric=metric))
        for block in range(2):
            prefix = f"model.layers.{block}"
            assert len({bits[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"}) == 1
            assert bits[f"{prefix}.mlp.gate_proj"] == bits[f"{prefix}.mlp.up_proj"]
    free = search(model, config(), data, 3.25, metric=metric, fuse=False)
    assert all(len(group.layers) == 1 for group in free.groups) and len(free.groups) == 14


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sensitive", [f"model.layers.{name}" for name in ("0.mlp.down_proj", "0.self_attn.o_proj")])
def test_a_sensitive_layer_gets_more_bits(metric: str, sensitive: str) -> None:
    """A layer that adds a hundred times as much to the stream: its rounding error does too."""
    model, data = tiny()
    ordinary = bits_of(search(model, config(), data, 3.6, metric=metric))[sensitive]
    with torch.no_grad():
        model.get_submodule(sensitive).weight *= 100
    assert bits_of(search(model, config(), data, 3.6, metric=metric))[sensitive] > ordinary


@pytest.mark.parametrize("metric", METRICS)
def test_a_larger_budget_never_loses_more(metric: str) -> None:
    model, data = tiny()
    results = [search(model, config(), data, 2.5 + step / 2, metric=metric) for step in range(13)]
    for smaller, larger in itertools.pairwise(results):
        assert larger.loss <= smaller.loss * (1 + 1e-6)
    assert results[0].loss > 10 * results[-1].loss > 0
    assert set(bits_of(results[0]).values()) == {2} and set(bits_of(results[-1]).values()) == {8}


def test_kl_ranks_as_measuring_the_quantized_models_does() -> None:
    """Two groups and a budget for one: it goes where the model quantized so has the smaller divergence."""
    names = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    for louder in names:
        model, data = tiny()
        with torch.no_grad():
            model.get_submodule(louder).weight *= 5
        only = config(modules_to_not_convert=[r"(?!.*o_proj).*"])
        result = search(model, only, data, 3.5, candidates=(2, 4), metric="kl")
        assert [group.layers for group in result.groups] == [(name,) for name in names]
        divergence = {}
        for chosen in names:
            overrides = {name: {"bits": 4 if name == chosen else 2} for name in names}
            quantized = hf_lowbit.quantize(copy.deepcopy(model), config(**{**fields(only), "overrides": overrides}))
            divergence[chosen] = kl(model, quantized, data[0])
        best = min(divergence, key=divergence.__getitem__)
        assert best == louder and bits_of(result) == {name: 4 if name == best else 2 for name in names}


def fields(given: hf_lowbit.LowbitConfig) -> dict[str, Any]:
    return {"modules_to_not_convert": given.modules_to_not_convert}


@torch.no_grad()
def kl(model: Any, other: Any, batch: dict[str, Any]) -> float:
    p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_configs_own_overrides_count() -> None:
    """Bits that they give are kept; other fields go with the bits that were found."""
    model, data = tiny()
    own = {r".*\.o_proj": {"bits": 8}, "mlp": {"group_size": 16}, "layers.1.self_attn": {"symmetric": False}}
    result = search(model, config(overrides=own), data, 4.5)
    assert {group.layers for group in result.groups if group.fixed} == {
        (f"model.layers.{block}.self_attn.o_proj",) for block in range(2)
    }
    report = hf_lowbit.report(hf_lowbit.quantize(model, result.config))
    layers = {layer.name.removesuffix(".weight"): layer for layer in report.layers}
    assert report.bits_per_weight == result.bits_per_weight
    assert {name: layer.bits for name, layer in layers.items()} == bits_of(result)
    assert all(layer.bits == 8 for name, layer in layers.items() if name.endswith("o_proj"))
    assert all(layer.group_size == (16 if ".mlp." in name else 32) for name, layer in layers.items())
    assert not layers["model.layers.1.self_attn.q_proj"].symmetric and layers["model.layers.0.mlp.up_proj"].symmetric


def test_tied_embeddings_are_counted_once_and_packed_alike() -> None:
    model, data = tiny("llama_tied")
    result = search(model, config(quantize_embeddings=True), data, 3.3, metric="kl")
    bits = bits_of(result)
    assert bits["model.embed_tokens"] == bits["lm_head"]
    report = hf_lowbit.report(hf_lowbit.quantize(model, result.config))
    assert report.bits_per_weight == result.bits_per_weight and "lm_head" not in report.skipped


def test_training_mode_is_restored() -> None:
    model, data = tiny()
    search(model.train(), config(), data)
    assert model.training


@pytest.mark.parametrize("budget", [2.4, 8.6, 0, float("nan")])
def test_an_impossible_budget_is_refused_before_data_is_read(budget: float) -> None:
    model, _ = tiny()
    with pytest.raises(AllocationError, match=r"2\.5 to 8\.5 bits per weight"):
        search(model, config(), "there is no such file.txt", budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "guess"}, "unknown metric 'guess'; known: hessian, output, kl"),
        ({"candidates": ()}, "candidates must be"),
        ({"candidates": (2.5, 4)}, "candidates must be"),
        ({"candidates": (4, 9)}, "the candidate of 9 bits cannot be"),
        ({"rounding": "best"}, "rounding must be"),
        ({"kl_samples": 0}, "kl_samples must be"),
        ({"data": None}, "needs calibration data"),
    ],
)
def test_wrong_requests(options: dict[str, Any], message: str) -> None:
    model, data = tiny()
    with pytest.raises(ConfigError, match=message):
        search(model, config(), **{"data": data, "bits_per_weight": 4.0, **options})


def test_a_quantized_model_is_refused() -> None:
    model, data = tiny()
    hf_lowbit.quantize(model, config())
    with pytest.raises(ConfigError, match="quantized already"):
        search(model, config(), data)
    with torch.device("meta"):
        empty = MODELS["llama"].build()
    with pytest.raises(ConfigError, match="meta device"):
        search(empty, config(), data)


def test_a_format_without_the_candidates_is_refused() -> None:
    model, data = tiny()
    with pytest.raises(ConfigError, match="the candidate of 8 bits cannot be"):
        search(model, config(format="nf"), data)
    assert search(model, config(format="nf"), data, candidates=(2, 3, 4)).bits_per_weight <= 3.25
