"""GPTQ as a plugin: what reaches the rounding, in which order, and what becomes of layers it cannot round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_lowbit
import hf_lowbit_gptq.recipe
from hf_lowbit import GPTQConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.config import ConfigError
from hf_lowbit.formats.packed import scales
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.gptq import CholeskyError, gptq
from tests.plugins.outliers import (
    IDLE,
    logit_error,
    one_token,
    outlier_llama,
    quantized,
    tiny_moe,
    token_batches,
    values_of,
)

W3 = {"bits": 3, "group_size": 32}


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every call of the rounding: its arguments."""
    calls: list[dict[str, Any]] = []

    def spy(weight: Tensor, spec: Any, hessian: Tensor, **options: Any) -> Any:
        calls.append({"weight": weight.clone(), "hessian": hessian, **options})
        return gptq(weight, spec, hessian, **options)

    monkeypatch.setattr(hf_lowbit_gptq.recipe, "gptq", spy)
    return calls


def notes_of(model: Any, ending: str) -> list[str]:
    return [warning for warning in hf_lowbit.report(model).warnings if ending in warning]


@pytest.mark.parametrize("symmetric", [True, False])
def test_less_is_lost_than_rounding_to_nearest(symmetric: bool) -> None:
    reference = outlier_llama()
    ours = logit_error(quantized(outlier_llama(), GPTQConfig(**W3, symmetric=symmetric)), reference)
    rtn = logit_error(quantized(outlier_llama(), hf_lowbit.RTNConfig(**W3, symmetric=symmetric)), reference)
    assert ours < 0.7 * rtn


def test_fields_reach_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    config = GPTQConfig(**W3, damping=0.05, act_order=True, block_size=16)
    quantized(outlier_llama(), config)
    quantized(outlier_llama(), GPTQConfig(**W3, static_groups=False, search_clip=False))
    assert len(calls) == 2 * 2 * 7
    names = ("damping", "act_order", "block_size", "grid_fit", "static_groups")
    assert {tuple(call[name] for name in names) for call in calls[:14]} == {(0.05, True, 16, fit_clipped, True)}
    assert {tuple(call[name] for name in names) for call in calls[14:]} == {(0.01, False, 128, fit_range, False)}


def test_the_order_of_columns_changes_codes_not_scales() -> None:
    plain, ordered = (quantized(outlier_llama(), GPTQConfig(**W3, act_order=order)) for order in (False, True))
    first = "model.layers.0.self_attn.q_proj"
    a, b = (packed_modules(model)[first].packed() for model in (plain, ordered))
    assert torch.equal(scales(a), scales(b)) and not torch.equal(a.weight, b.weight)


def test_later_layers_read_what_quantized_earlier_ones_hand_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """true_sequential: q, k and v, then o, then gate and up, then down; each group sees those before it packed."""
    seen: list[tuple[list[str], list[str]]] = []
    collect = Block.collect

    def spy(self: Block, make: Any, keys: Any = None) -> Any:
        seen.append((sorted(keys or ()), sorted(packed_modules(self.module))))
        return collect(self, make, keys)

    monkeypatch.setattr(Block, "collect", spy)
    sequential = values_of(quantized(outlier_llama(), GPTQConfig(**W3, true_sequential=True)))
    groups = [
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    for index, (keys, packed) in enumerate(seen):
        assert keys == [f"{name}.weight" for name in groups[index % 4]]
        assert packed == sorted(name for group in groups[: index % 4] for name in group)
    assert len(seen) == 8
    at_once = values_of(quantized(outlier_llama(), GPTQConfig(**W3)))
    same = {
        name for name in at_once if name.startswith("model.layers.0") and torch.equal(at_once[name], sequential[name])
    }
    assert same == {f"model.layers.0.{name}.weight" for name in groups[0]}


def test_layers_of_one_input_share_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    quantized(outlier_llama(), GPTQConfig(**W3))
    hessians = [call["hessian"] for call in calls[:7]]
    distinct = [
        h for i, h in enumerate(hessians) if not any(h.shape == o.shape and torch.equal(h, o) for o in hessians[:i])
    ]
    assert len(distinct) == 4


def test_columns_without_input_become_zero() -> None:
    model = outlier_llama()
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[[5, 41]] = 0.0
    values = values_of(quantized(model, GPTQConfig(**W3, symmetric=False)))
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = values[f"model.layers.1.self_attn.{name}.weight"]
        assert not bool(weight[:, [5, 41]].any()) and bool(weight[:, [4, 6]].any())


@pytest.mark.parametrize("true_sequential", [False, True])
def test_experts_without_tokens_are_rounded_to_nearest_and_noted(true_sequential: bool) -> None:
    model = quantized(tiny_moe(), GPTQConfig(**W3, true_sequential=true_sequential), one_token())
    notes = notes_of(model, IDLE)
    assert len(notes) == 2 * 2 * 2, "two of four experts, gate_up and down, in two blocks"
    values, nearest = values_of(model), values_of(quantized(tiny_moe(), hf_lowbit.RTNConfig(**W3)))
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"
        stack = name.partition("[")[0]
        same = torch.equal(values[stack][expert], nearest[stack][expert])
        assert same == any(note.startswith(name) for note in notes)


def test_a_hessian_that_cannot_be_factorised_is_rounded_to_nearest_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: Tensor, spec: Any, hessian: Tensor, **options: Any) -> Any:
        if weight.shape[1] == 96:  # down_proj
            raise CholeskyError("its Hessian is not positive definite even with damping=1")
        return gptq(weight, spec, hessian, **options)

    monkeypatch.setattr(hf_lowbit_gptq.recipe, "gptq", fail)
    model = quantized(outlier_llama(), GPTQConfig(**W3))
    assert notes_of(model, "its Hessian") == [
        f"model.layers.{i}.mlp.down_proj.weight: its Hessian is not positive definite even with damping=1: "
        "rounded to nearest"
        for i in range(2)
    ]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(values_of(model)[name], values_of(quantized(outlier_llama(), hf_lowbit.RTNConfig(**W3)))[name])


def test_damping_that_had_to_grow_is_noted() -> None:
    """Eight tokens for 64 channels, and next to no damping."""
    few = token_batches(1, tokens=4)
    model = quantized(outlier_llama(), GPTQConfig(**W3, damping=1e-13), few)
    assert notes_of(model, "its Hessian needed damping=1e-")
    assert not notes_of(quantized(outlier_llama(), GPTQConfig(**W3), few), "damping")


def test_what_has_no_inputs_is_noted_once() -> None:
    model = quantized(outlier_llama(), GPTQConfig(**W3, quantize_embeddings=True))
    assert len([note for note in notes_of(model, "nearest") if "embed" in note]) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"damping": 0}, "damping must lie above 0 and not above 10, not 0"),
        ({"damping": 11.0}, "damping must lie above 0 and not above 10, not 11.0"),
        ({"damping": float("nan")}, "damping must lie above 0 and not above 10, not nan"),
        ({"damping": True}, "damping must lie above 0 and not above 10, not True"),
        ({"damping": "1%"}, "damping must lie above 0 and not above 10, not '1%'"),
        ({"block_size": 0}, "block_size must be a positive integer, not 0"),
        ({"block_size": 32.0}, "block_size must be a positive integer, not 32.0"),
        ({"act_order": 1}, "act_order must be True or False, not 1"),
        ({"static_groups": None}, "static_groups must be True or False, not None"),
        ({"search_clip": "no"}, "search_clip must be True or False, not 'no'"),
        ({"true_sequential": 0}, "true_sequential must be True or False, not 0"),
        ({"act_order": True, "static_groups": False}, "act_order=True needs static_groups=True"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"GPTQConfig: {message}"):
        GPTQConfig(bits=4, **values)
