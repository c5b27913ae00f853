"""Products of one input in a graph: joined where they read the same, with the results of each alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec
from hf_lowbit.kernels.joining import JoinProducts
from hf_lowbit.kernels.kept import KEPT_PRODUCTS, KeptMatrix, kept_product
from hf_lowbit.kernels.ops import PRODUCTS, inference_product
from hf_lowbit.rounding import round_to_nearest

SPECS = (
    WeightSpec(bits=4, group_size=32),
    WeightSpec(bits=3, group_size=32, symmetric=False),
    WeightSpec(format="nf", bits=4, group_size="tensor"),
)


@pytest.fixture
def weights() -> list[PackedTensor]:
    torch.manual_seed(0)
    return [round_to_nearest(torch.randn(8 * n, 64), spec) for n, spec in enumerate(SPECS, 1)]


class Projections(torch.nn.Module):
    """All weights times the input, and the last one times something else, too."""

    def __init__(self, weights: list[PackedTensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = [inference_product(x, weight) for weight in self.weights]
        return [*results, inference_product(x.relu(), self.weights[-1])]


class KeptProjections(torch.nn.Module):
    """The same of matrices that are kept."""

    def __init__(self, weights: list[PackedTensor]) -> None:
        super().__init__()
        self.weights = [KeptMatrix(packed) for packed in weights]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        results = [kept_product(x, weight, None) for weight in self.weights]
        return [*results, kept_product(x.relu(), self.weights[-1], None)]


@torch.no_grad()
def test_products_of_one_input_become_one_call(weights: list[PackedTensor]) -> None:
    x = torch.randn(2, 1, 64)
    model = Projections(weights)
    module = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    calls = [node for node in module.graph.nodes if node.target is PRODUCTS]
    assert len(calls) == 4
    JoinProducts()(module.graph)
    module.graph.lint()
    module.recompile()
    joined, alone = (node for node in module.graph.nodes if node.target is PRODUCTS)
    assert [node.args for node in joined.users] == [(joined, 0, 0, 16), (joined, 0, 16, 48), (joined, 0, 48, 96)]
    assert joined.meta["val"].shape == (96,)
    assert alone.meta["val"].shape == (48,)
    for result, expected in zip(module(x), model(x), strict=True):
        assert torch.equal(result, expected)


@torch.no_grad()
def test_products_are_joined_with_those_of_the_same_activation(weights: list[PackedTensor]) -> None:
    activations = (None, ActivationSpec("int", 8), ActivationSpec("int", 8))

    def model(x: torch.Tensor) -> list[torch.Tensor]:
        return [inference_product(x, weights[0], activation) for activation in activations]

    x = torch.randn(1, 64)
    module = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    JoinProducts()(module.graph)
    module.recompile()
    calls = [node for node in module.graph.nodes if node.target is PRODUCTS]
    assert [node.args[4] for node in calls] == ["", "{'format': 'int', 'bits': 8}"]
    for result, expected in zip(module(x), model(x), strict=True):
        assert torch.equal(result, expected)


@torch.no_grad()
def test_kept_matrices_are_joined_among_themselves(weights: list[PackedTensor]) -> None:
    kept = [KeptMatrix(packed) for packed in weights]

    def model(x: torch.Tensor) -> list[torch.Tensor]:
        return [inference_product(x, weights[0]), *(kept_product(x, matrix, None) for matrix in kept)]

    x = torch.randn(1, 64)
    module = make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    JoinProducts()(module.graph)
    module.graph.lint()
    module.recompile()
    (call,) = (node for node in module.graph.nodes if node.target is KEPT_PRODUCTS)
    assert call.args[1:] == ([matrix.number for matrix in kept], sum(matrix.rows for matrix in kept), "")
    for result, expected in zip(module(x), model(x), strict=True):
        assert torch.equal(result, expected)


@torch.no_grad()
@pytest.mark.parametrize("is_kept", [False, True])
def test_inductor_takes_the_pass(weights: list[PackedTensor], is_kept: bool) -> None:
    x, model, calls = torch.randn(1, 64), KeptProjections(weights) if is_kept else Projections(weights), []

    class Counted(JoinProducts):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            calls.extend(node for node in graph.nodes if node.target in (PRODUCTS, KEPT_PRODUCTS))

        def uuid(self) -> None:
            return None  # not from the cache

    compiled = torch.compile(model, fullgraph=True, options={"post_grad_custom_pre_pass": Counted()})
    for result, expected in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(result, expected)
    assert len(calls) == 2


def test_equal_options_are_equal() -> None:
    assert JoinProducts() == copy.deepcopy(JoinProducts())
    assert JoinProducts().uuid() == JoinProducts().uuid()
