"""Ranks of low-rank branches within a budget: alone, and together with bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.allocation import AllocationError
from hf_lowbit.config import ConfigError, LowRankConfig
from hf_lowbit.search import SearchResult, search
from tests.test_search import config, tiny

RANKS = (0, 2, 4, 8)


def ranks_of(result: SearchResult) -> dict[str, int]:
    return {name: rank for group in result.groups for name, rank in group.ranks.items()}


@pytest.mark.parametrize("budget", [2.8, 4.0, 5.5])
@pytest.mark.parametrize("factor_bits", [16, 8])
def test_bits_and_ranks_meet_the_budget_together(budget: float, factor_bits: int) -> None:
    model, data = tiny()
    given = config(low_rank=LowRankConfig(8, metric="full", factor_bits=factor_bits))
    result = search(model, given, data, budget, candidates=(2, 3, 4), ranks=RANKS)
    report = hf_lowbit.report(hf_lowbit.quantize(model, result.config, data))
    assert report.bits_per_weight == result.bits_per_weight <= budget
    found = {layer.name.removesuffix(".weight"): (layer.bits, layer.low_rank) for layer in report.layers}
    assert found == {name: (group.bits, rank) for group in result.groups for name, rank in group.ranks.items()}
    for group in result.groups:
        assert set(group.ranks) == set(group.layers) and set(group.ranks.values()) <= set(RANKS)


def test_layers_that_share_their_bits_have_ranks_of_their_own() -> None:
    model, data = tiny()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.v_proj").weight *= 20
    differing = []
    for step in range(6):
        result = search(model, config(), data, 3.0 + step / 2, candidates=(2, 3), ranks=RANKS)
        assert result.config.low_rank == LowRankConfig(8, metric="full")
        differing += [group for group in result.groups if len(set(group.ranks.values())) > 1]
    assert differing


def test_more_to_choose_from_never_loses_more() -> None:
    model, data = tiny()
    for budget in (3.0, 4.0, 5.0):
        bits = search(model, config(), data, budget, candidates=(2, 3, 4, 8)).loss
        both = search(model, config(), data, budget, candidates=(2, 3, 4, 8), ranks=RANKS)
        assert both.loss <= bits * (1 + 1e-6)
        low_rank = dataclasses.replace(both.config.low_rank, factor_bits=8)
        cheaper = search(model, config(low_rank=low_rank), data, budget, candidates=(2, 3, 4, 8), ranks=RANKS)
        assert cheaper.loss <= both.loss * (1 + 1e-6)


def test_ranks_that_overrides_give_are_kept() -> None:
    model, data = tiny()
    given = config(low_rank={"rank": 8, "metric": "full"}, overrides={"down_proj": {"low_rank": 0}})
    result = search(model, given, data, 9.0, candidates=(3,), ranks=RANKS, allows_less=True)
    found = ranks_of(result)
    assert {rank for name, rank in found.items() if name.endswith("down_proj")} == {0}
    assert {rank for name, rank in found.items() if not name.endswith("down_proj")} == {8}
    report = hf_lowbit.report(hf_lowbit.quantize(model, dataclasses.replace(result.config, bits=3), data))
    assert report.bits_per_weight == result.bits_per_weight


@pytest.mark.parametrize("method", ["RTNConfig", "GPTQConfig"])
@pytest.mark.parametrize("metric", ["identity", "full"])
def test_a_config_with_a_budget_chooses_its_ranks(method: str, metric: str) -> None:
    model, data = tiny()
    part = LowRankConfig(8, budget_bits=4.6, metric=metric)
    given = getattr(hf_lowbit, method)(bits=3, group_size=32, num_samples=2, low_rank=part)
    model = hf_lowbit.quantize(model, given, data)
    report = hf_lowbit.report(model)
    assert 4.2 < report.bits_per_weight <= 4.6
    assert len({layer.low_rank for layer in report.layers}) > 1
    assert any("low rank: of 14 layers" in line for line in report.warnings)


def test_a_budget_beyond_the_largest_rank_is_no_error() -> None:
    model, data = tiny()
    part = LowRankConfig(8, budget_bits=15.0, metric="full")
    report = hf_lowbit.report(hf_lowbit.quantize(model, config(bits=3, low_rank=part), data))
    assert {layer.low_rank for layer in report.layers} == {8}


def test_a_budget_below_the_base_format_is_refused() -> None:
    model, data = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = LowRankConfig(8, budget_bits=3.2, metric="full")
    with pytest.raises(AllocationError, match=r"3\.2 bits per weight cannot be reached: .* store 3\.5 to"):
        hf_lowbit.quantize(model, config(bits=3, low_rank=part), data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({}, {"ranks": ()}, "ranks must be a list"),
        ({}, {"ranks": (0, -1)}, "ranks must be a list"),
        ({}, {"ranks": RANKS, "metric": "kl"}, "use 'hessian' for ranks"),
        ({"low_rank": {"keep": "fused"}}, {"ranks": RANKS}, "stores no factors"),
    ],
)
def test_ranks_that_cannot_be_are_refused(fields: dict[str, Any], options: dict[str, Any], said: str) -> None:
    model, data = tiny()
    with pytest.raises(ConfigError, match=said):
        search(model, config(**fields), data, 4.0, **options)
