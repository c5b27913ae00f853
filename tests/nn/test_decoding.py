"""Layers that decode token after token notice everything that happens to them in between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import LayerSpec, PackedLinear, PackedModule, connect_siblings
from hf_lowbit.rounding import round_to_nearest

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
SPEC = LayerSpec(WeightSpec(bits=4, group_size=32))
X = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3))


class Attention(nn.Module):
    """Projections of one input, and one of their own."""

    def __init__(self, pack: Pack) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "o_proj"):
            setattr(self, name, pack(nn.Linear(64, 64), SPEC))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x))


def expected(attention: nn.Module, x: Tensor) -> Tensor:
    """By the decoded weights."""

    def linear(name: str, x: Tensor) -> Tensor:
        layer = attention.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        return nn.functional.linear(x, layer.dequantized(), layer.bias)

    return linear("o_proj", linear("q_proj", x) + linear("k_proj", x))


@pytest.fixture
def attention(pack: Pack) -> Attention:
    """One that has decoded."""
    torch.manual_seed(0)
    attention = Attention(pack)
    connect_siblings(attention)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(attention(X), expected(attention, X), rtol=1e-4, atol=1e-4)
    return attention


def other_codes(layer: PackedLinear, seed: int = 5) -> dict[str, Tensor]:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    packed = round_to_nearest(weight, layer.layer_spec.weight)
    return {f"weight{suffix}": tensor for suffix, tensor in packed.tensors().items()}


def repack(attention: Attention) -> None:
    for layer in (attention.k_proj, attention.o_proj):
        for key, tensor in other_codes(layer).items():
            setattr(layer, key, nn.Parameter(tensor, requires_grad=False))


def load(attention: Attention) -> None:
    for layer in (attention.k_proj, attention.o_proj):
        layer.load_state_dict({**layer.state_dict(), **other_codes(layer)})


def load_assigning(attention: Attention) -> None:
    for layer in (attention.k_proj, attention.o_proj):
        layer.load_state_dict({**layer.state_dict(), **other_codes(layer)}, assign=True)


def move(attention: Attention) -> None:
    """What ``.to`` does: parameters stay the same objects, and their data lie elsewhere. The old place is cleared."""
    for parameter in attention.parameters():
        old, parameter.data = parameter.data, parameter.data.clone()
        old.zero_()


def change_format(attention: Attention) -> None:
    for layer in (attention.k_proj, attention.o_proj):
        layer.layer_spec = LayerSpec(WeightSpec("nf", bits=4, group_size=32))


def change_bias(attention: Attention) -> None:
    attention.q_proj.bias = nn.Parameter(torch.ones(64))
    with torch.no_grad():
        attention.o_proj.bias.add_(1)


def drop_bias(attention: Attention) -> None:
    attention.q_proj.bias = attention.o_proj.bias = None


def force_backend(attention: Attention) -> None:
    for layer in (attention.q_proj, attention.k_proj, attention.o_proj):
        layer.backend = "reference"


@pytest.mark.parametrize(
    "change", [repack, load, load_assigning, move, change_format, change_bias, drop_bias, force_backend]
)
def test_changes_of_a_layer_are_noticed(change: Callable[[Attention], None], attention: Attention) -> None:
    change(attention)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(attention(X), expected(attention, X), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_low_rank_branch_and_a_wrapper_that_come_later(attention: Attention) -> None:
    before = attention(X)
    wrapped = attention.o_proj

    class Adapter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return wrapped(x) + 1

    attention.o_proj = Adapter()
    torch.testing.assert_close(attention(X), before + 1)
    attention.o_proj = wrapped
    handle = attention.k_proj.register_forward_hook(lambda module, inputs, output: 0 * output)
    without_k = attention.o_proj(attention.q_proj(X))
    torch.testing.assert_close(attention(X), without_k)
    handle.remove()
    torch.testing.assert_close(attention(X), before)


@torch.no_grad()
def test_weights_that_come_for_a_call_and_go_again(attention: Attention) -> None:
    """Offloading puts a parameter in the place of another before every call, and an empty one after it."""
    before, stored = attention(X), dict(attention.o_proj._parameters)
    for _ in range(2):
        for name, parameter in stored.items():
            attention.o_proj._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, parameter in stored.items():
            attention.o_proj._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
        assert torch.equal(attention(X), before)


def test_gradients_and_types_after_decoding(attention: Attention) -> None:
    x = X.clone().requires_grad_()
    attention(x).sum().backward()
    (gradient,) = torch.autograd.grad(expected(attention, other := X.clone().requires_grad_()).sum(), other)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        half = attention(X.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), expected(attention, X), rtol=3e-2, atol=3e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(X).dtype == torch.bfloat16
        torch.testing.assert_close(attention(X), expected(attention, X), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_after_decoding_and_decoded_after_compiling(attention: Attention) -> None:
    before = attention(X)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), before)
    repack(attention)
    torch.testing.assert_close(compiled(X), expected(attention, X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attention(X), expected(attention, X), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_decode_by_their_own_weights(attention: Attention) -> None:
    before = attention(X)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention.o_proj))):
        layer = other if isinstance(other, PackedLinear) else other.o_proj
        for parameter in layer.parameters():
            parameter.zero_()
        assert torch.equal(layer(X), torch.zeros_like(X))
    assert torch.equal(attention(X), before)
