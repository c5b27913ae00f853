"""Attention of one token as plain sums: torch's results, in graphs where it may be; others are left as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from hf_lowbit.kernels.joining import JoinProducts
from hf_lowbit.kernels.one_pass import OnePass
from hf_lowbit.kernels.one_query import ATTENTION, SumOneQuery

BATCH, HEADS, KEYS, WIDTH = 2, 6, 11, 16
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: torch.arange(KEYS)[None, None, None] < torch.tensor([7, KEYS])[:, None, None, None],
    "float": lambda: torch.randn(BATCH, HEADS, 1, KEYS),
    "matrix": lambda: torch.randn(1, KEYS),
}


def repeat(x: Tensor, heads: int) -> Tensor:
    """As transformers does for every head of a group."""
    batch, groups, keys, width = x.shape
    return x[:, :, None].expand(batch, groups, heads // groups, keys, width).reshape(batch, heads, keys, width)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    repeated = (repeat(x, HEADS) if x.shape[1] < HEADS else x for x in (k, v))
    return scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=scale)


def inputs(dtype: torch.dtype, groups: int = HEADS, queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, queries, WIDTH).to(dtype)
    k, v = torch.randn(2, BATCH, groups, KEYS, WIDTH).to(dtype)
    return q, k, v


def traced(function: Callable[..., object], *arguments: object, mode: str = "fake") -> GraphModule:
    with torch.no_grad():
        module = make_fx(lambda *given: function(*given), tracing_mode=mode)(*arguments)
    module.graph.eliminate_dead_code()
    return module


def rewritten(function: Callable[..., object], *arguments: object, mode: str = "fake") -> GraphModule:
    module = traced(function, *arguments, mode=mode)
    SumOneQuery()(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def targets(module: GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [HEADS, 3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gives_what_attention_in_float32_does(dtype: torch.dtype, groups: int, mask: str) -> None:
    q, k, v = inputs(dtype, groups)
    given = MASKS[mask]()
    given = given if given is None or given.dtype == torch.bool else given.to(dtype)
    wide = given if given is None or given.dtype == torch.bool else given.float()
    assert ATTENTION in targets(traced(attend, q, k, v, given, 0.3))
    module = rewritten(attend, q, k, v, given, 0.3)
    assert ATTENTION not in targets(module)
    result = module(q, k, v, given, 0.3)
    expected = attend(q.float(), k.float(), v.float(), wide, 0.3)
    assert (result.dtype, result.shape) == (dtype, q.shape)
    torch.testing.assert_close(result, expected.to(dtype))


def test_reads_shared_keys_where_they_are() -> None:
    module = rewritten(attend, *inputs(torch.bfloat16, groups=2))
    assert torch.ops.aten.clone.default not in targets(module)
    sizes = [node.meta["val"].numel() for node in module.graph.nodes if node.target is torch.ops.aten.expand.default]
    assert not sizes


def test_other_repeats_stay() -> None:
    """Heads in another order than that of groups: (a, b, a, b)."""

    def cyclic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))

    arguments = inputs(torch.float32, groups=2)
    module = rewritten(cyclic, *arguments)
    assert ATTENTION not in targets(module)
    torch.testing.assert_close(module(*arguments), cyclic(*arguments))


def test_scales_by_the_width_unless_told() -> None:
    arguments = inputs(torch.float32)
    torch.testing.assert_close(rewritten(attend, *arguments)(*arguments), attend(*arguments))


@pytest.mark.parametrize("mask", [torch.zeros(1, KEYS, dtype=torch.bool), torch.full((1, KEYS), float("-inf"))])
def test_a_query_that_sees_no_key_gives_zeros(mask: Tensor) -> None:
    arguments = *inputs(torch.float32), mask
    result = rewritten(attend, *arguments)(*arguments)
    assert torch.equal(result, attend(*arguments))
    assert not result.any()


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def with_logarithms(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    result, logarithms = ATTENTION(q, k, v)
    return result, logarithms


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (attend, inputs(torch.bfloat16, queries=2)),
        (attend, inputs(torch.float64)),
        (causal, inputs(torch.bfloat16)),
        (with_logarithms, inputs(torch.bfloat16)),
    ],
    ids=["two queries", "float64", "causal", "its logarithms are read"],
)
def test_others_are_left_alone(function: Callable[..., object], arguments: tuple[Tensor, ...]) -> None:
    before = targets(traced(function, *arguments))
    assert ATTENTION in before
    assert targets(rewritten(function, *arguments)) == before


def test_unknown_sizes_are_left_alone() -> None:
    assert ATTENTION in targets(rewritten(attend, *inputs(torch.bfloat16), mode="symbolic"))


@torch.no_grad()
def test_inductor_takes_the_pass() -> None:
    seen: list[object] = []

    class Watched(SumOneQuery):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.extend(node.target for node in graph.nodes)
            super().__call__(graph)
            seen.extend(node.target for node in graph.nodes if node.target is ATTENTION)

        def uuid(self) -> None:
            return None  # not from the cache

    arguments = *inputs(torch.bfloat16, groups=2), torch.randn(1, KEYS).bfloat16()
    options = {"post_grad_custom_pre_pass": OnePass((JoinProducts(), Watched()))}
    result = torch.compile(attend, fullgraph=True, options=options)(*arguments)
    torch.testing.assert_close(result, attend(*(x.float() for x in arguments)).bfloat16())
    assert seen.count(ATTENTION) == 1  # before, and not after


@torch.no_grad()
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_takes_any_number_of_keys(groups: int) -> None:
    """As graphs of caches of several lengths have it."""
    left: list[int] = []

    class Watched(SumOneQuery):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            left.append(sum(node.target is ATTENTION for node in graph.nodes))

        def uuid(self) -> None:
            return None  # not from the cache

    torch._dynamo.reset()  # else the groups of the last test are taken for a size that changes, too
    compiled = torch.compile(attend, fullgraph=True, options={"post_grad_custom_pre_pass": Watched()})
    q, k, v = inputs(torch.bfloat16, groups=groups)
    for keys in (KEYS, 5, 8):
        given = [q, k[:, :, :keys].contiguous(), v[:, :, :keys].contiguous(), torch.randn(1, keys).bfloat16()]
        if keys == KEYS:
            for tensor, dim in zip(given[1:], (2, 2, 1), strict=True):
                torch._dynamo.mark_dynamic(tensor, dim)
        result, expected = compiled(*given), attend(*(x.float() for x in given)).bfloat16()
        assert left and not any(left)
        torch.testing.assert_close(result, expected)


def test_equal_options_are_equal() -> None:
    passes = OnePass((JoinProducts(), SumOneQuery()))
    assert passes == copy.deepcopy(passes)
    assert passes.uuid() == (JoinProducts().uuid(), SumOneQuery().uuid())


def test_a_pass_without_uuid_keeps_all_out_of_the_cache() -> None:
    class Unknown(SumOneQuery):
        def uuid(self) -> None:
            return None

    assert OnePass((JoinProducts(), Unknown())).uuid() is None
