"""Products with one or two tokens, whose inputs are digits: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import PackedTensor
from hf_lowbit.kernels import triton
from hf_lowbit.kernels.triton import blocks
from hf_lowbit.kernels.triton.products import suits_digits
from tests.kernels.cpu.matrices import random_packed
from tests.kernels.triton.test_products import DEVICE, DTYPES, TOLERANCE, inputs, moved, relative

DTYPES = [dtype for dtype in DTYPES if dtype != torch.float32]
ROWS, COLUMNS = 32, 1024


@pytest.fixture(params=(1, 2), ids="{} ahead".format)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix is large enough."""
    shape = {"SLICES": 2, "ROWS": 16, "AHEAD": request.param, "num_warps": 2}
    monkeypatch.setattr(blocks, "digits_block", lambda *_: shape)
    monkeypatch.setattr("hf_lowbit.kernels.triton.products.has_digits", lambda *_: True)
    monkeypatch.setattr(blocks, "EAGER_DIGITS_BYTES", 0)


def described(packed: PackedTensor, dtype: torch.dtype) -> triton.Matrix:
    matrix = triton.describe(moved(packed), dtype)
    assert matrix is not None and suits_digits(torch.empty(1, packed.columns, dtype=dtype, device=DEVICE), matrix)
    return matrix


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", ("float32", "float16"))
@pytest.mark.parametrize(
    ("bits", "group_size"), ((2, None), (2, 512), (4, None), (4, 128), (4, 256), (8, None), (8, 64))
)
def test_equals_the_reference(bits: int, group_size: int | None, scale_dtype: str, dtype: torch.dtype) -> None:
    packed = random_packed(ROWS, COLUMNS, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    matrix = described(packed, dtype)
    for tokens in (1, 2):
        x = inputs(tokens, COLUMNS, dtype)
        y = triton.linear(x, matrix)
        assert y.dtype == dtype and y.shape == (tokens, ROWS)
        assert relative(y, x, packed) < TOLERANCE[dtype] / 8  # the output is rounded, and nothing else


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_inputs_keep_their_digits_beside_large_ones(dtype: torch.dtype) -> None:
    packed = random_packed(ROWS, COLUMNS, bits=4, group_size=128)
    packed.weight[:, 0] = packed.weight[:, 0] & ~0xF000 | 0x8000  # the fourth column is zero
    x = inputs(1, COLUMNS, dtype)
    x[0, 3] = 2**12  # 2^18 times the others
    y = triton.linear(x, described(packed, dtype))
    x[0, 3] = 0
    assert relative(y, x, packed) < TOLERANCE[dtype] / 8


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 0.0))
def test_a_token_that_is_not_finite_stays_so_alone_and_nothing_gives_zero(value: float) -> None:
    packed = random_packed(ROWS, COLUMNS, bits=4, group_size=128)
    x = inputs(2, COLUMNS, torch.float16)
    x[1] = value
    y = triton.linear(x, described(packed, torch.float16))
    assert torch.isfinite(y[0]).all()
    assert not (y[1].any() if value == 0 else torch.isfinite(y[1]).any())


def test_which_products_are_measured_to_be_faster() -> None:
    def suits(rows: int, columns: int, tokens: int = 1, dtype: torch.dtype = torch.float16, **fields: object) -> bool:
        matrix = triton.describe(moved(random_packed(rows, columns, **fields)), dtype)
        assert matrix is not None
        return suits_digits(torch.empty(tokens, columns, dtype=dtype, device=DEVICE), matrix)

    assert suits(16, 4096, bits=4, group_size=128)
    assert not suits(16, 2048, bits=4, group_size=128) and not suits(16, 8192, bits=4, group_size=128)
    for fields in (
        {"bits": 4, "group_size": 64},
        {"bits": 2},
        {"bits": 8},
        {"bits": 4, "symmetric": False},
        {"bits": 3},
    ):
        assert not suits(16, 4096, **fields)
    assert suits(8192, 2048, bits=4, group_size=512) and not suits(8192, 2048, bits=4, group_size=1024)
    assert not suits(16, 4096, tokens=2, bits=4) and not suits(24, 4096, bits=4) and not suits(16, 4096 + 64, bits=4)
    assert not suits(16, 4096, dtype=torch.float32, bits=4)
