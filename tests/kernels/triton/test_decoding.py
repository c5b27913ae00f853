"""Layers that decode on a GPU, token after token, notice what happens to them in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.kernels import triton
from hf_lowbit.kernels.triton.compiled import Bound
from hf_lowbit.kernels.triton.launch import launch_digits, launch_fused
from hf_lowbit.kernels.triton.products import takes_digits
from hf_lowbit.nn import LayerSpec, PackedLinear, connect_siblings
from hf_lowbit.rounding import round_to_nearest
from tests.kernels.cpu.matrices import random_packed
from tests.kernels.triton.test_products import inputs, moved

ROWS, COLUMNS = 96, 512
SPECS = {
    "int4": WeightSpec(bits=4, group_size=128),
    "int4 with zero points": WeightSpec(bits=4, group_size=128, symmetric=False),
    "int8": WeightSpec(bits=8),
    "int3": WeightSpec(bits=3, group_size=128),
    "nf4": WeightSpec("nf", bits=4, group_size=64),
    "a fitted table": WeightSpec("codebook", bits=4, group_size=128),
    "int5, decoded first": WeightSpec(bits=5, group_size=128),
}


def packed_of(spec: WeightSpec, seed: int) -> PackedTensor:
    return round_to_nearest(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)), spec)


def layer_of(spec: WeightSpec, seed: int = 0) -> PackedLinear:
    layer = PackedLinear.from_float(nn.Linear(COLUMNS, ROWS), LayerSpec(spec))
    layer.allocate("weight", packed=False)
    layer.set_packed("weight", packed_of(spec, seed))
    return layer.cuda().eval()


def token(seed: int, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(leading or (1, 1)), COLUMNS, generator=generator).to("cuda", torch.bfloat16)


def assert_right(layer: PackedLinear, x: Tensor) -> None:
    expected = nn.functional.linear(x.float(), layer.dequantized(), layer.bias)
    torch.testing.assert_close(layer(x).float(), expected, rtol=2e-2, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_token_after_token(name: str) -> None:
    layer = layer_of(SPECS[name])
    for seed in range(4):
        assert_right(layer, token(seed))
    for leading in ((1, 3), (16,), (300,), (1, 1)):
        for seed in range(2):
            assert_right(layer, token(seed, *leading))


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_changes_are_noticed(name: str) -> None:
    layer, x = layer_of(SPECS[name]), token(1)
    assert_right(layer, x)
    for key, tensor in packed_of(SPECS[name], 1).tensors().items():
        getattr(layer, f"weight{key}").copy_(tensor)  # to the same place
    assert_right(layer, x)
    for parameter in layer.parameters():
        old, parameter.data = parameter.data, parameter.data.clone()
        old.zero_()
    assert_right(layer, x)
    layer.set_packed("weight", layer_of(SPECS[name], 2).packed())
    assert_right(layer, x)
    assert_right(layer, torch.nn.functional.pad(x, (1, 0))[..., 1:])  # neither aligned nor contiguous
    assert_right(layer, torch.cat([x.new_zeros(1), x.flatten()])[1:].view(1, 1, -1))  # not aligned
    layer.cpu()
    expected = layer(x.cpu())
    layer.cuda()
    torch.testing.assert_close(layer(x).cpu(), expected, rtol=2e-2, atol=0.02 * float(expected.abs().max()))


@torch.no_grad()
def test_streams_and_graphs_launch_where_they_are() -> None:
    layer, x = layer_of(SPECS["int4"]), token(1)
    expected = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = layer(torch.ones_like(x) * x)
    stream.synchronize()
    assert torch.equal(y, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(token(2))
    graph.replay()
    assert torch.equal(y, layer(x)) and not torch.equal(y, expected)


class Attention(nn.Module):
    def __init__(self, *specs: WeightSpec) -> None:
        super().__init__()
        for seed, (name, spec) in enumerate(zip(("q_proj", "k_proj", "v_proj"), specs, strict=True)):
            setattr(self, name, layer_of(spec, seed))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


ALIKE, OTHER = SPECS["int4"], SPECS["int8"]


@pytest.mark.parametrize(
    ("specs", "count"), (((ALIKE,) * 3, 1), ((ALIKE, OTHER, ALIKE), 2)), ids=("alike", "one other")
)
@torch.no_grad()
def test_siblings_that_are_alike_are_one_launch(
    specs: tuple[WeightSpec, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, made = Attention(*specs), list[Bound]()
    x = token(0)
    alone = attention(x)
    assert connect_siblings(attention) == 1
    attention(x)  # is found
    real = Bound.__call__

    def counted(bound: Bound, *tensors: Tensor) -> None:
        made.append(bound)
        real(bound, *tensors)

    monkeypatch.setattr(Bound, "__call__", counted)
    for seed in (1, 0):
        y = attention(token(seed))
    assert torch.equal(y, alone)
    assert len(made) == 2 * count and sum(len(bound.steps) for bound in made) == 2 * count
    attention.k_proj.set_packed("weight", layer_of(specs[1], 7).packed())
    assert_right(attention.k_proj, x)


@torch.no_grad()
def test_siblings_in_a_graph() -> None:
    attention, x = Attention(*(ALIKE,) * 3), token(0)
    assert connect_siblings(attention) == 1
    attention(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attention(x)
    for seed in (1, 2):
        x.copy_(token(seed))
        graph.replay()
        torch.testing.assert_close(y, attention(token(seed)), rtol=2e-2, atol=0.02)


@torch.no_grad()
def test_a_graph_records_digits_and_python_launches_the_fused_kernel() -> None:
    """Both are launched before a graph is recorded: compiled is nothing in it."""
    matrix = triton.describe(moved(random_packed(64, 4096, bits=4, group_size=128)), torch.bfloat16)
    x = inputs(1, 4096, torch.bfloat16)
    assert matrix is not None
    assert takes_digits(x, (matrix,), recorded=True) and not takes_digits(x, (matrix,), recorded=False)
    launch, out, recorded = triton.prepare(x, (matrix,)), x.new_empty(1, 64), x.new_empty(1, 64)
    assert launch is not None
    launch(x, out)
    assert torch.equal(out, launch_fused(x, (matrix,), None, x.dtype)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(x, recorded)
        straight = triton.linear(x, matrix)
    graph.replay()
    assert torch.equal(recorded, launch_digits(x, matrix, recorded=True)) and torch.equal(straight, recorded)
