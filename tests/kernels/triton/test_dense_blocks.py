"""The table of the kernel for many tokens: when it is taken, and how its tiles are divided."""

from __future__ import annotations

import pytest

from hf_lowbit.kernels.triton import dense_blocks
from hf_lowbit.kernels.triton.dense_blocks import SHAPES, Division


def test_many_tokens_and_large_matrices() -> None:
    assert dense_blocks.is_fastest(65, 4096, 4096) and not dense_blocks.is_fastest(64, 4096, 4096)
    assert dense_blocks.is_fastest(64, 14336, 4096) and not dense_blocks.is_fastest(32, 14336, 4096)
    assert dense_blocks.is_fastest(64, 4096, 14336) and not dense_blocks.is_fastest(2048, 1024, 4096)


@pytest.mark.parametrize("tokens", (65, 128, 500, 1000, 4096))
@pytest.mark.parametrize(("rows", "columns"), ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (8, 256)))
def test_every_tile_is_someones(tokens: int, rows: int, columns: int) -> None:
    blocks = 132
    for shape in SHAPES:
        tiles = -(-tokens // shape.tokens) * -(-rows // shape.rows)
        for (whole, rest, parts), clocks in dense_blocks.divisions(tokens, rows, columns, blocks, shape):
            assert whole + rest == tiles and clocks > 0
            if parts > 1:
                assert whole % blocks == 0 and rest * parts <= blocks
                assert columns // (2 * dense_blocks.STEP) // parts >= 2  # producers take turns within each
    shape, division = dense_blocks.choose(tokens, rows, columns, blocks)
    assert shape in SHAPES and division.parts >= 1


def test_the_tensor_cores_are_kept_busy() -> None:
    """The most tokens of a tile for a prompt; what is left over in parts; few tokens in small tiles."""
    large, middle, small = SHAPES
    assert dense_blocks.choose(2048, 4096, 4096, 132) == (large, Division(256, 0, 1))
    assert dense_blocks.choose(1024, 14336, 4096, 132) == (large, Division(396, 52, 2))
    assert dense_blocks.choose(128, 4096, 14336, 132) == (middle, Division(0, 32, 4))
    assert dense_blocks.choose(64, 14336, 4096, 132) == (small, Division(112, 0, 1))
