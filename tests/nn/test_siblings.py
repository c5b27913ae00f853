"""Siblings compute together, and nothing is wrong where they cannot."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import cpu
from hf_lowbit.nn import LayerSpec, PackedLinear, connect_siblings, disconnect_siblings
from hf_lowbit.nn import siblings as module
from hf_lowbit.rounding import round_to_nearest


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, rows, bits in (("q_proj", 64, 4), ("k_proj", 32, 8), ("v_proj", 32, 4), ("o_proj", 64, 4)):
            linear = nn.Linear(64, rows)
            packed = PackedLinear.from_float(linear, LayerSpec(WeightSpec(bits=bits, group_size=32)))
            packed.allocate("weight", packed=False)
            packed.set_packed("weight", round_to_nearest(linear.weight.detach(), packed.layer_spec.weight))
            setattr(self, name, packed)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each joint call computed."""
    made: list[int] = []
    real = module.packed_linears

    def counted(x: torch.Tensor, weights: Any, *rest: Any) -> Any:
        made.append(len(weights))
        return real(x, weights, *rest)

    monkeypatch.setattr(module, "packed_linears", counted)
    return made


@pytest.fixture
def attention() -> Attention:
    model = Attention()
    assert connect_siblings(model) == 1
    return model


@torch.no_grad()
def test_one_call_for_all_gives_the_same_bits(attention: Attention, calls: list[int]) -> None:
    for tokens in (1, 16):
        x = torch.randn(1, tokens, 64)
        together = attention(x)
        disconnect_siblings(attention)
        alone = attention(x)
        connect_siblings(attention)
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert calls == [3, 3]


@torch.no_grad()
def test_the_next_token_takes_the_same_way(attention: Attention, calls: list[int]) -> None:
    for _ in range(3):
        x = torch.randn(1, 1, 64)
        together = attention(x)
        for name, y in zip(("q_proj", "k_proj", "v_proj"), together, strict=True):
            layer = attention.get_submodule(name)
            assert isinstance(layer, PackedLinear)
            torch.testing.assert_close(y, nn.functional.linear(x, layer.dequantized(), layer.bias))
    assert calls == ([3] if cpu.available() else [3] * 3)  # what is known is the native product


@torch.no_grad()
def test_nothing_is_kept_when_all_have_come(attention: Attention) -> None:
    attention(torch.randn(1, 64))
    group = attention.q_proj.siblings
    assert group._results == {} and group._input is None


@torch.no_grad()
def test_an_input_changed_in_place_is_computed_again(attention: Attention) -> None:
    x = torch.randn(1, 64)
    attention.q_proj(x)
    x += 1
    k = attention.k_proj(x)
    disconnect_siblings(attention)
    assert torch.equal(k, attention.k_proj(x))


@torch.no_grad()
def test_siblings_with_inputs_of_their_own_stop_trying(attention: Attention, calls: list[int]) -> None:
    for _ in range(4):
        x, memory = torch.randn(1, 64), torch.randn(1, 64)
        q, k = attention.q_proj(x), attention.k_proj(memory)
        assert torch.allclose(
            q, torch.nn.functional.linear(x, attention.q_proj.dequantized(), attention.q_proj.bias), atol=1e-4
        )
        assert torch.allclose(
            k, torch.nn.functional.linear(memory, attention.k_proj.dequantized(), attention.k_proj.bias), atol=1e-4
        )
    assert calls == [3] and not attention.q_proj.siblings.active


def test_gradients_hooks_adapters_and_offloading_switch_it_off(attention: Attention, calls: list[int]) -> None:
    attention(torch.randn(1, 64, requires_grad=True))[1].sum().backward()
    with torch.no_grad():
        handle = attention.k_proj.register_forward_hook(lambda *_: None)
        attention(torch.randn(1, 64))
        handle.remove()
        attention.v_proj.forward = attention.v_proj.forward  # what offloading does to a module
        attention(torch.randn(1, 64))
        del attention.v_proj.__dict__["forward"]
        wrapped, attention.k_proj = attention.k_proj, nn.Sequential(attention.k_proj)  # what an adapter does
        attention(torch.randn(1, 64))
        attention.k_proj = wrapped
    with torch.inference_mode():
        attention(torch.randn(1, 64))
    with torch.no_grad():
        attention(torch.randn(17, 64))  # too many tokens
    assert calls == []
    with torch.no_grad():
        attention(torch.randn(1, 64))
    assert calls == [3]


@torch.no_grad()
def test_copies_and_pickles_are_alone(attention: Attention, calls: list[int]) -> None:
    x = torch.randn(1, 64)
    expected = attention(x)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert other.q_proj.siblings is None
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
        assert set(other.state_dict()) == set(attention.state_dict())
    assert calls == [3]
