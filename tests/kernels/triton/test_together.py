"""Matrices that share a launch, and what decides between one launch and two: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowbit.kernels import triton
from hf_lowbit.kernels.triton import blocks
from hf_lowbit.kernels.triton.products import suits_digits, takes_digits
from tests.kernels.cpu.matrices import random_packed
from tests.kernels.triton.test_products import DEVICE, inputs, moved

COLUMNS = 256
FORMATS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 64, "symmetric": False},
    {"bits": 2, "group_size": None},
    {"bits": 8},
    {"format": "nf", "bits": 4, "group_size": 64},
)


@pytest.mark.parametrize("tokens", (1, 5))
@pytest.mark.parametrize("rows", ((40, 24), (24, 7, 64)), ids=str)
@pytest.mark.parametrize("fields", FORMATS, ids=str)
def test_one_launch_gives_the_bits_of_several(fields: dict[str, Any], rows: tuple[int, ...], tokens: int) -> None:
    from hf_lowbit.kernels.triton.launch import alike, launch_fused

    x = inputs(tokens, COLUMNS, torch.float16)
    described = [triton.describe(moved(random_packed(height, COLUMNS, **fields)), x.dtype) for height in rows]
    matrices = [matrix for matrix in described if matrix is not None]
    assert len({alike(x, matrix) for matrix in matrices}) == 1
    together = launch_fused(x, matrices, None, x.dtype)
    alone = [launch_fused(x, (matrix,), None, x.dtype)[0] for matrix in matrices]
    assert [y.shape for y in together] == [(tokens, height) for height in rows]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_other_formats_and_other_blocks_are_not_alike() -> None:
    from hf_lowbit.kernels.triton.launch import alike

    x = inputs(1, COLUMNS, torch.float16)

    def kind(rows: int, **fields: Any) -> tuple[Any, ...]:
        matrix = triton.describe(moved(random_packed(rows, COLUMNS, **fields)), x.dtype)
        assert matrix is not None
        return alike(x, matrix)

    four = kind(16, bits=4, group_size=128)
    assert four == kind(48, bits=4, group_size=128)
    assert four != kind(16, bits=4, group_size=64) and four != kind(16, bits=8)
    assert kind(16, bits=8) != kind(blocks._MANY_ROWS, bits=8)


def test_digits_are_for_graphs_and_for_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 4096, dtype=torch.float16, device=DEVICE)
    matrix = triton.describe(moved(random_packed(16, 4096, bits=4, group_size=128)), x.dtype)
    assert matrix is not None and suits_digits(x, matrix)
    one, two, size = (matrix,), (matrix, matrix), matrix.packed.weight.nbytes
    assert takes_digits(x, one, recorded=True) and not takes_digits(x, two, recorded=True)
    assert not takes_digits(x, one, recorded=False)
    monkeypatch.setattr(blocks, "EAGER_DIGITS_BYTES", 2 * size)
    monkeypatch.setattr(blocks, "JOINT_DIGITS_BYTES", 2 * size)
    assert takes_digits(x, two, recorded=False) and takes_digits(x, two, recorded=True)
    assert not takes_digits(x, one, recorded=False)
    monkeypatch.setattr("hf_lowbit.kernels.triton.products.suits_digits", lambda *_: False)
    assert not takes_digits(x, two, recorded=False) and not takes_digits(x, one, recorded=True)
