"""The kernel for many tokens, whose weights are decoded in shared memory: on Hopper, where Triton has Gluon."""

from __future__ import annotations

import ast

import pytest
import torch

from hf_lowbit.formats import decode
from hf_lowbit.kernels import triton
from hf_lowbit.kernels.triton import dense_blocks, products
from hf_lowbit.kernels.triton.dense_blocks import SHAPES, Division
from tests.kernels.cpu.matrices import random_packed
from tests.kernels.triton.test_products import DEVICE, TOLERANCE, inputs, moved, relative

BFLOAT16 = {"bits": 4, "group_size": 128, "scale_dtype": "bfloat16"}


def divided(tokens: int, rows: int, shape: dense_blocks.Shape, parts: int) -> Division:
    """All tiles whole, or all but the first one, if there are several, in parts."""
    tiles = -(-tokens // shape.tokens) * -(-rows // shape.rows)
    return Division(tiles, 0, 1) if parts == 1 else Division(int(tiles > 1), tiles - int(tiles > 1), parts)


@pytest.mark.parametrize("parts", (1, 3))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.tokens))
@pytest.mark.parametrize(
    ("group_size", "dtype"),
    ((128, "bfloat16"), (64, "bfloat16"), (256, "bfloat16"), (None, "float16"), (128, "float16")),
)
def test_equals_decoded_weights(
    group_size: int | None, dtype: str, shape: dense_blocks.Shape, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of tokens, and rows that no tile ends with."""
    kind = getattr(torch, dtype)
    monkeypatch.setattr(dense_blocks, "is_fastest", lambda *_: True)
    for rows, columns, tokens in ((136, 768, 1), (384, 1280, 70), (8, 2048, 257), (1000, 1024, 130)):
        monkeypatch.setattr(dense_blocks, "choose", lambda t, r, c, b: (shape, divided(t, r, shape, parts)))
        packed = random_packed(rows, columns, bits=4, group_size=group_size, scale_dtype=dtype)
        matrix = triton.describe(moved(packed), kind)
        x = inputs(tokens, columns, kind)
        assert matrix is not None and products.suits_dense(x, matrix)
        y = triton.linear(x, matrix)
        assert y.dtype == kind and y.shape == (tokens, rows)
        assert relative(y, x, packed) < TOLERANCE[kind]
        assert torch.equal(y, triton.linear(x, matrix))
        exact = x.double() @ decode(moved(packed), kind).double().t()
        assert (y.double() - exact).norm() < 4e-3 * exact.norm()


def test_more_tiles_than_blocks() -> None:
    """So that each has several, and what is left in the end is in parts; in a CUDA graph, too."""
    packed = random_packed(8192, 1024, **BFLOAT16)
    matrix, x = triton.describe(moved(packed), torch.bfloat16), inputs(900, 1024, torch.bfloat16)
    assert matrix is not None and products.suits_dense(x, matrix)
    y = triton.linear(x, matrix)
    assert relative(y, x, packed) < TOLERANCE[torch.bfloat16]
    graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        recorded = triton.linear(given, matrix)
    given.copy_(x)
    recorded.fill_(float("nan"))
    graph.replay()
    assert torch.equal(recorded, y)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_token_that_is_not_finite_stays_so_alone(value: float) -> None:
    matrix = triton.describe(moved(random_packed(8192, 1024, **BFLOAT16)), torch.bfloat16)
    x = torch.ones(140, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[70, 7] = value
    assert matrix is not None and products.suits_dense(x, matrix)
    finite = torch.isfinite(triton.linear(x, matrix)).all(1)
    assert not finite[70] and int(finite.sum()) == len(x) - 1


def test_strided_inputs() -> None:
    matrix = triton.describe(moved(random_packed(8192, 1024, **BFLOAT16)), torch.bfloat16)
    assert matrix is not None
    wide = inputs(80, 1025, torch.bfloat16)
    for x in (wide[:, :1024], wide[:, 1:]):
        assert torch.equal(triton.linear(x, matrix), triton.linear(x.contiguous().clone(), matrix))


def test_goes_the_other_way_where_the_kernel_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.compiler.errors import CompilationError

    from hf_lowbit.kernels.triton import dense_launch

    def refuse(*_: object) -> None:
        raise CompilationError(None, ast.Pass(lineno=1, col_offset=0), "a name that is not there")

    packed = random_packed(8192, 1024, **BFLOAT16)
    matrix, x = triton.describe(moved(packed), torch.bfloat16), inputs(100, 1024, torch.bfloat16)
    assert matrix is not None and products.suits_dense(x, matrix)
    monkeypatch.setattr(dense_launch, "_refused", [])
    monkeypatch.setattr(dense_launch, "launch", refuse)
    for _ in range(2):
        assert dense_launch.launch_dense(x, matrix) is None
        assert relative(triton.linear(x, matrix), x, packed) < TOLERANCE[torch.bfloat16]
    assert len(dense_launch._refused) == 1
    monkeypatch.setattr(products, "has_gluon", lambda: False)
    assert not products.suits_dense(x, matrix)


def test_other_inputs_go_other_ways() -> None:
    matrix = triton.describe(moved(random_packed(8192, 1024, **BFLOAT16)), torch.float16)
    other = triton.describe(moved(random_packed(8192, 1024, **BFLOAT16)), torch.bfloat16)
    assert matrix is not None and other is not None
    assert not products.suits_dense(inputs(100, 1024, torch.float16), matrix)  # scales are not of its type
    assert not products.suits_dense(inputs(3, 1024, torch.bfloat16), other)
    assert triton.prepare(inputs(48, 1024, torch.bfloat16), [other]) is None
