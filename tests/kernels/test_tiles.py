"""Products through decoded tiles: what torch multiplies, a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import ActivationSpec, decode
from hf_lowbit.kernels import packed_linear, products, routes, sliced_linear, tiles
from hf_lowbit.kernels.activation import quantize_tokens
from tests.kernels.cpu.matrices import random_packed


@pytest.mark.parametrize("group_size", (None, "tensor"))
@pytest.mark.parametrize("columns", (192, 103))
def test_int8_tiles_are_exact(group_size: str | None, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_TILE_BYTES", 16 * columns)  # several tiles, the last one short
    packed = random_packed(37, columns, bits=8, group_size=group_size)
    codes, scale = quantize_tokens(torch.randn(29, columns), ActivationSpec("int", 8))
    result = tiles.tiled_codes_product(codes, scale, packed, torch.float32)
    exact = (codes.double() * scale) @ decode(packed).double().t()
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_many_tokens_take_the_matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "has_int8_matrix_unit", lambda: True)
    called = []
    original = products.tiled_codes_product
    monkeypatch.setattr(products, "tiled_codes_product", lambda *a: called.append(a[0].shape[0]) or original(*a))
    activation = ActivationSpec("int", 8)
    plain, grouped = random_packed(16, 64, bits=8), random_packed(16, 64, bits=8, group_size=32)
    for packed in (plain, grouped):
        for tokens in (routes.INT8_TILE_TOKENS - 1, routes.INT8_TILE_TOKENS):
            x = torch.randn(tokens, 64)
            expected = sliced_linear(*quantize_tokens(x, activation), packed, torch.float32)
            torch.testing.assert_close(packed_linear(x, packed, activation), expected, rtol=1e-5, atol=1e-4)
    assert called == [routes.INT8_TILE_TOKENS]
