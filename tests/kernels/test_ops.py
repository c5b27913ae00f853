"""The custom operators: traced whole by torch.compile and torch.export, with the results of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels import ops, row_sums
from hf_lowbit.nn import LayerSpec, PackedConv2d, PackedEmbedding, PackedLinear
from hf_lowbit.rounding import round_to_nearest


def pack(cls: Any, float_module: nn.Module, spec: LayerSpec) -> Any:
    module = cls.from_float(float_module, spec)
    module.allocate("weight", packed=False)
    matrix = module.to_matrix("weight", float_module.get_parameter("weight").detach())
    module.set_packed("weight", round_to_nearest(matrix, spec.weight))
    return module


class Net(nn.Module):
    def __init__(self, activation: ActivationSpec | None) -> None:
        super().__init__()
        self.embedding = pack(PackedEmbedding, nn.Embedding(50, 32), LayerSpec(WeightSpec(bits=4, group_size=16)))
        self.up = pack(PackedLinear, nn.Linear(32, 64), LayerSpec(WeightSpec(bits=4, group_size=32), activation))
        self.down = pack(PackedLinear, nn.Linear(64, 32), LayerSpec(WeightSpec(format="nf", bits=4), activation))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embedding(tokens))))


@pytest.fixture(params=[None, ActivationSpec("int", 8)], ids=["W4A16", "W4A8"])
def net(request: pytest.FixtureRequest) -> Net:
    return Net(request.param).requires_grad_(False)


TRACERS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "compile": lambda net, tokens: torch.compile(net, fullgraph=True, backend="aot_eager"),
    "inductor": lambda net, tokens: torch.compile(net, fullgraph=True),
    "export": lambda net, tokens: torch.export.export(net, (tokens,)).module(),
}


@pytest.mark.parametrize("tracer", TRACERS)
@torch.no_grad()
def test_is_traced_whole_and_equal(net: Net, tracer: str) -> None:
    tokens = torch.randint(50, (2, 7))
    expected = net(tokens)
    torch.testing.assert_close(TRACERS[tracer](net, tokens)(tokens), expected, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_the_compiled_layer() -> None:
    layer = pack(PackedLinear, nn.Linear(32, 24), LayerSpec(WeightSpec(bits=4, group_size=32)))
    x = torch.randn(3, 32, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled, x.grad = x.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(compiled, x.grad)


def test_a_convolution_is_traced_whole() -> None:
    conv = pack(PackedConv2d, nn.Conv2d(8, 16, 3, padding=1), LayerSpec(WeightSpec(bits=8))).requires_grad_(False)
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(torch.compile(conv, fullgraph=True, backend="aot_eager")(x), conv(x))


@pytest.mark.parametrize(
    "activation",
    [None, ActivationSpec("int", 8, static=True), ActivationSpec("int", 8, symmetric=False, static=True)],
    ids=str,
)
def test_the_operator_keeps_torchs_contract(activation: ActivationSpec | None) -> None:
    packed = round_to_nearest(torch.randn(16, 64), WeightSpec(bits=4, group_size=32))
    told: tuple[object, ...] = (None, None, None, None)
    if activation is not None:
        shift = None if activation.symmetric else torch.tensor([0.5])
        sums = None if activation.symmetric else row_sums(packed, 1)
        told = (activation.json, torch.tensor([0.02]), shift, sums)
    arguments = (torch.randn(3, 64, requires_grad=True), *ops._arguments(packed), *told, None)
    torch.library.opcheck(torch.ops.hf_lowbit.linear.default, arguments)
