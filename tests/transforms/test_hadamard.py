"""Hadamard matrices of every order that models need, their fast product, and random rotations."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.transforms.hadamard import hadamard, hadamard_base, hadamard_matrix, largest_hadamard
from hf_lowbit.transforms.rotation import mean_preserving, random_hadamard, random_orthogonal

# 28: Paley over 13, or 27 = 3^3; 52 over 25 = 5^2; 344 over 343 = 7^3; 576, 384, 896: with factors of two
ORDERS = [1, 2, 4, 12, 20, 24, 28, 36, 40, 52, 60, 64, 108, 140, 344, 384, 576, 896]


# 2
@pytest.mark.parametrize("order", ORDERS)
def test_matrices_are_orthogonal_with_entries_of_one_size(order: int) -> None:
    matrix = hadamard_matrix(order)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(order, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("width", "base"),
    [(4096, 1), (11008, 344), (13824, 108), (14336, 28), (18944, 148), (8960, 140), (4864, 76), (1536, 12), (576, 36)],
)
def test_widths_of_known_models_have_one(width: int, base: int) -> None:
    assert hadamard_base(width) == base


@pytest.mark.parametrize("width", [3, 6, 7, 86, 13696])  # 13696 = 128 * 107
def test_other_widths_are_covered_by_blocks(width: int) -> None:
    assert hadamard_base(width) is None
    assert largest_hadamard(width) == {3: 1, 6: 2, 7: 1, 86: 2, 13696: 128}[width]
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {width}"):
        hadamard(torch.zeros(1, width))


@pytest.mark.parametrize(("order", "inner"), [(8, 1), (12, 1), (24, 2), (3 * 16, 1), (4, 12), (2, 24)])
def test_the_product_is_that_of_the_kronecker_product(order: int, inner: int) -> None:
    x = torch.randn(2, 5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = torch.eye(96 // (order * inner), dtype=torch.float64)
    matrix = torch.kron(torch.kron(blocks, hadamard_matrix(order)), torch.eye(inner, dtype=torch.float64))
    torch.testing.assert_close(hadamard(x, order, inner), x @ matrix)
    torch.testing.assert_close(hadamard(x, order, inner, inverse=True), x @ matrix.t())


def test_half_types_are_summed_in_float32() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(hadamard(x), hadamard(x.float())) and hadamard(x).dtype == torch.float32


def test_blocks_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="blocks of 8 x 4 channels do not divide 48"):
        hadamard(torch.zeros(1, 48), 8, 4)


# 2
@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal, mean_preserving])
@pytest.mark.parametrize("order", [10, 48])
def test_rotations_are_orthogonal_and_named_by_their_seed(make: object, order: int) -> None:
    q = make(order, 3)(torch.eye(order))  # type: ignore[operator]
    torch.testing.assert_close(q @ q.t(), torch.eye(order, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(q, make(order, 3)(torch.eye(order)))  # type: ignore[operator]
    assert not torch.allclose(q, make(order, 4)(torch.eye(order)))  # type: ignore[operator]


def test_the_mean_is_preserved() -> None:
    x = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = mean_preserving(20)
    torch.testing.assert_close(rotation(torch.ones(1, 20)), torch.ones(1, 20, dtype=torch.float64))
    torch.testing.assert_close(rotation(x).mean(-1), x.mean(-1))
    assert not torch.allclose(random_hadamard(20)(x).mean(-1), x.mean(-1))
