"""Folding scales: the function stays, and so do shapes and types."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.pytorch_utils import Conv1D

from hf_lowbit.transforms import (
    FoldError,
    divide_outputs,
    expand_scale,
    fold_scale,
    gather_repeats,
    multiply_inputs,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _scale(channels: int) -> torch.Tensor:
    return 4 ** torch.rand(channels) / 2


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


class Experts(nn.Module):
    """Fused as in transformers."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 20) if transposed else torch.randn(3, 20, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 10, 8) if transposed else torch.randn(3, 8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What all experts read."""
        weight = self.gate_up_proj if self.is_transposed else self.gate_up_proj.mT
        return x @ weight


class Router(nn.Module):
    """A weight used by F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return F.linear(x, self.weight)


def _norm(bias: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(8, bias=bias)
    nn.init.normal_(norm.weight)
    if bias:
        nn.init.normal_(norm.bias)
    return norm


def test_three_consumers_divide_the_norm_once():
    norm, layers, s, x = _norm(), [nn.Linear(8, n) for n in (3, 5, 8)], _scale(8), torch.randn(6, 8)
    before, weight, bias = [layer(norm(x)) for layer in layers], norm.weight.clone(), norm.bias.clone()
    fold_scale(norm, layers, s)
    assert torch.allclose(norm.weight, weight / s, rtol=1e-6) and torch.allclose(norm.bias, bias / s, rtol=1e-6)
    for layer, expected in zip(layers, before, strict=True):
        assert _close(layer(norm(x)), expected)


def test_folding_the_inverse_undoes_it():
    norm, layer, s = _norm(), nn.Linear(8, 4), _scale(8)
    weight, columns = norm.weight.clone(), layer.weight.clone()
    fold_scale(norm, [layer], s)
    assert not _close(layer.weight, columns, 1e-2)
    fold_scale(norm, [layer], 1 / s)
    assert _close(norm.weight, weight, 1e-6) and _close(layer.weight, columns, 1e-6)


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "conv1d"])
def test_linear_layers_with_bias(make):
    first, second, s, x = make(8, 12), make(12, 5), _scale(12), torch.randn(6, 8)
    nn.init.normal_(first.bias)
    before, hidden = second(first(x)), first(x)
    fold_scale(first, [second], s)
    assert _close(second(first(x)), before)
    assert _close(first(x), hidden / s)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_and_their_router(transposed):
    norm, experts, router, s, x = _norm(False), Experts(transposed), Router(), _scale(8), torch.randn(6, 8)
    before, down = (experts(norm(x)), router(norm(x))), experts.down_proj.clone()
    fold_scale(norm, [router, experts], s)
    assert _close(experts(norm(x)), before[0]) and _close(router(norm(x)), before[1])
    assert torch.equal(experts.down_proj, down)


def test_norms_whose_weight_is_an_offset_from_one():
    norm, layer, s, x = GemmaRMSNorm(8), nn.Linear(8, 4), _scale(8), torch.randn(6, 8)
    nn.init.normal_(norm.weight, std=0.3)
    before, hidden = layer(norm(x)), norm(x)
    fold_scale(norm, [layer], s, offset=True)
    assert _close(layer(norm(x)), before) and _close(norm(x), hidden / s)


def test_query_heads_that_share_a_value_head():
    """2 value heads of 4 channels, each read by 3 query heads, as transformers' repeat_kv lays them out."""
    v, o, s, x = nn.Linear(8, 8), nn.Linear(24, 8), _scale(8), torch.randn(6, 8)

    def run() -> torch.Tensor:
        return o(v(x).reshape(6, 2, 4).repeat_interleave(3, 1).reshape(6, 24))

    before = run()
    fold_scale(v, [o], s, repeat=3, head_dim=4)
    assert _close(run(), before)


def test_repeats_are_gathered_as_they_are_expanded():
    values = torch.arange(8.0)
    expanded = expand_scale(values, 3, 4)
    assert torch.equal(expanded[:12], torch.arange(4.0).repeat(3))
    assert torch.equal(gather_repeats(expanded, 3, 4), values.expand(3, 8))
    assert torch.equal(gather_repeats(values), values[None]) and torch.equal(expand_scale(values), values)


def test_the_halves_make_the_whole():
    norm, layer, s, x = _norm(), nn.Linear(8, 4), _scale(8), torch.randn(6, 8)
    before = layer(norm(x))
    multiply_inputs(layer, s)
    assert _close(layer(norm(x) / s), before)
    divide_outputs(norm, s)
    assert _close(layer(norm(x)), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_shapes_and_identity_stay(dtype):
    norm, layer = _norm().to(dtype), nn.Linear(8, 4).to(dtype)
    parameters = [*norm.parameters(), *layer.parameters()]
    before = [(id(p), p.dtype, p.shape, p.requires_grad) for p in parameters]
    expected = (norm.weight.double() / 3).to(dtype)
    fold_scale(norm, [layer], torch.full((8,), 3.0))
    after = [*norm.parameters(), *layer.parameters()]
    assert before == [(id(p), p.dtype, p.shape, p.requires_grad) for p in after]
    assert torch.equal(norm.weight, expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused_and_change_nothing(bad):
    norm, layer, s = _norm(), nn.Linear(8, 4), torch.ones(8) * 2
    s[3] = bad
    before = norm.weight.clone(), layer.weight.clone()
    with pytest.raises(ValueError, match="zero, negative, NaN or infinite"):
        fold_scale(norm, [layer], s)
    assert torch.equal(norm.weight, before[0]) and torch.equal(layer.weight, before[1])


def test_modules_that_do_not_fit_are_refused_and_nothing_changes():
    norm, layer, s = _norm(), nn.Linear(8, 4), torch.full((8,), 2.0)
    weights = norm.weight.clone(), layer.weight.clone()
    for previous, consumers, scale, options, message in (
        (norm, [layer, nn.Linear(9, 4)], s, {}, "does not fit the 9 channels"),
        (norm, [layer], torch.ones(7), {}, "does not fit the 8 channels"),
        (norm, [layer], torch.ones(1), {}, "does not fit the 8 channels"),
        (norm, [layer, nn.GELU()], s, {}, "GELU has no input columns"),
        (norm, [layer, nn.Embedding(4, 8)], s, {}, "Embedding has no input columns"),
        (nn.GELU(), [layer], s, {}, "GELU has no outputs"),
        (nn.Linear(8, 8), [layer], s, {"offset": True}, "offset=True is for norms"),
        (norm, [layer], s, {"repeat": 2}, "needs a head_dim"),
        (norm, [layer], s, {"repeat": 2, "head_dim": 3}, "needs a head_dim"),
    ):
        with pytest.raises(FoldError, match=message):
            fold_scale(previous, consumers, scale, **options)
    assert torch.equal(norm.weight, weights[0]) and torch.equal(layer.weight, weights[1])


def test_overflow_of_the_stored_type_is_refused():
    norm, layer = _norm().half(), nn.Linear(8, 4).half()
    weights = norm.weight.clone(), layer.weight.clone()
    with pytest.raises(FoldError, match="beyond what"):
        fold_scale(norm, [layer], torch.full((8,), 1e7))
    assert torch.equal(norm.weight, weights[0]) and torch.equal(layer.weight, weights[1])
