"""Packed layers in CUDA graphs: recorded by hand, and by torch.compile's "reduce-overhead"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit.kernels.triton import matrix
from hf_lowbit.plan import packed_modules

FORMATS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 64},
    {"bits": 3, "group_size": 64},  # decoded to memory
    {"format": "nf", "bits": 4, "group_size": 64},  # a table that codes are looked up in
    {"bits": 4, "group_size": 64, "symmetric": False},
    {"bits": 8, "group_size": None, "activation_bits": 8},
)


@pytest.fixture(params=FORMATS, ids=str)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """An embedding, a layer and a head, packed on the GPU; nothing of them is remembered from another test."""
    matrix._table.cache_clear()
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Embedding(96, 256), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 96))
    config = hf_lowbit.RTNConfig(**request.param, quantize_embeddings=True)
    packed: nn.Module = hf_lowbit.quantize(floats.to("cuda", torch.bfloat16), config)
    return packed


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(96, (1, 3), generator=torch.Generator().manual_seed(seed)).cuda()


@torch.no_grad()
def expected(model: nn.Module, index: torch.Tensor) -> torch.Tensor:
    """By torch alone."""
    for module in packed_modules(model).values():
        module.backend = "reference"
    y: torch.Tensor = model(index)
    for module in packed_modules(model).values():
        module.backend = None
    return y


@torch.no_grad()
def test_a_graph_repeats_the_model_on_other_inputs(model: nn.Module) -> None:
    index = tokens(0)
    model(index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(index)
    for seed in (1, 2):
        index.copy_(tokens(seed))
        graph.replay()
        torch.testing.assert_close(y, expected(model, tokens(seed)), rtol=0.03, atol=0.03)


@torch.no_grad()
def test_compiled_with_graphs_it_is_the_same(model: nn.Module) -> None:
    """What is first made while a graph warms up must outlive it."""
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    results = []
    for seed in range(4):
        results.append(compiled(tokens(seed)).clone())
        torch.full((1 << 20,), torch.nan, device="cuda")  # takes memory that was given back
    for seed, y in enumerate(results):
        torch.testing.assert_close(y, expected(model, tokens(seed)), rtol=0.03, atol=0.03)
