"""Products that Triton's interpreter cannot repeat: bfloat16, which numpy lacks, and compiled graphs."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import ActivationSpec, decode
from hf_lowbit.kernels import packed_linear, triton
from hf_lowbit.kernels.triton import blocks
from tests.kernels.cpu.matrices import random_packed
from tests.kernels.triton.test_products import DEVICE, inputs, moved


@pytest.mark.parametrize("bits", (4, 8))
def test_sums_of_codes_are_exact(bits: int) -> None:
    """Integers below 2^24: float32 holds every one."""
    packed = random_packed(19, 128, bits=bits)
    codes = torch.randint(-127, 128, (6, 128), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    matrix = triton.describe(moved(packed), torch.bfloat16)
    assert matrix is not None and triton.multiplies_codes(matrix, ActivationSpec("int", 8))
    scale = torch.rand(6, 1) + 0.5
    y = triton.linear_of_codes(codes.to(DEVICE), scale.to(DEVICE), matrix, torch.float32)
    assert y is not None
    expected = (codes.double() * scale.double()) @ decode(packed).double().t()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_compiled_whole_it_is_the_same() -> None:
    packed, x = moved(random_packed(64, 256, bits=4, group_size=64)), inputs(3, 256).bfloat16()
    compiled = torch.compile(lambda x: packed_linear(x, packed) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), packed_linear(x, packed) + 1)


@pytest.mark.parametrize(
    "fields", ({"group_size": 128}, {"group_size": 64}, {"group_size": 64, "format": "nf"}), ids=str
)
def test_prepared_launches_repeat_the_product(fields: dict[str, object]) -> None:
    matrix = triton.describe(moved(random_packed(64, 2048, bits=4, **fields)), torch.bfloat16)
    assert matrix is not None
    for tokens in (1, 2, 16):
        launch = triton.prepare(inputs(tokens, 2048).bfloat16(), (matrix,))
        assert launch is not None
        for seed in (1, 2):
            x = torch.randn(tokens, 2048, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)
            out = x.new_empty(tokens, 64)
            launch(x, out)
            torch.testing.assert_close(out, triton.linear(x, matrix), rtol=0, atol=0)
    assert triton.prepare(inputs(300, 2048).bfloat16(), (matrix,)) is None


@torch.no_grad()
def test_tiles_decoded_on_another_stream_give_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE_ROWS", 32)
    matrix, x = triton.describe(moved(random_packed(150, 256, bits=4)), torch.bfloat16), inputs(300, 256).bfloat16()
    assert matrix is not None and x.shape[0] < blocks.OVERLAPPED_TOKENS
    expected = triton.linear(x, matrix)
    monkeypatch.setattr(blocks, "OVERLAPPED_TOKENS", 1)
    assert torch.equal(triton.linear(x, matrix), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton.linear(x, matrix)
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
