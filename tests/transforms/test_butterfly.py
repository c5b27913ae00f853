"""Butterflies: orthogonal, repeatable, cheap; and what they do to outliers (tests 1 and 4 of QuIP's method page)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_lowbit.transforms.butterfly import Butterfly, balanced_factors, draw_butterfly, rotate, rotate_back
from hf_lowbit.transforms.incoherence import balancing_scale, incoherence, with_ridge

SIZES = [1, 2, 7, 12, 60, 97, 128, 576]
ORDER = [3, 5, 4, 1, 0, 2]
OUTER = [[0.4191046, 0.9079379], [-0.9079379, 0.4191046]]
INNER = [[-0.8784406, 0.4723051, 0.0725954], [0.0051732, -0.1425119, 0.9897796], [-0.4778237, -0.8698381, -0.1227448]]


def dense(butterfly: Butterfly) -> Tensor:
    """V ``[n, n]``: V e_i is its i-th column."""
    return rotate(torch.eye(len(butterfly.order)), butterfly).t()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_orthogonal(size: int) -> None:
    v = dense(draw_butterfly(size, 3)).double()
    assert float((v @ v.t() - torch.eye(size)).norm(2)) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_back_is_the_inverse_and_the_transpose(size: int) -> None:
    butterfly, x = draw_butterfly(size, 3), gaussian(5, size)
    torch.testing.assert_close(rotate_back(rotate(x, butterfly), butterfly), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotate_back(x, butterfly), x @ dense(butterfly), rtol=1e-4, atol=1e-5)


def test_it_is_the_kronecker_product_after_the_permutation() -> None:
    butterfly = draw_butterfly(12, 3)
    permutation = torch.eye(12)[butterfly.order.long()]
    expected = torch.kron(butterfly.outer, butterfly.inner) @ permutation
    torch.testing.assert_close(dense(butterfly), expected)
    assert butterfly.outer.shape == (3, 3) and butterfly.inner.shape == (4, 4)


@pytest.mark.parametrize(
    ("size", "factors"), [(1, (1, 1)), (97, (1, 97)), (576, (24, 24)), (11008, (86, 128)), (13824, (108, 128))]
)
def test_factors_are_balanced(size: int, factors: tuple[int, int]) -> None:
    assert balanced_factors(size) == factors


def test_no_channel_no_butterfly() -> None:
    with pytest.raises(ValueError, match="at least one channel"):
        balanced_factors(0)


def test_seeds_and_sizes_name_a_butterfly() -> None:
    first = draw_butterfly(60, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, draw_butterfly(60, 1, 0), strict=True))
    for other in (draw_butterfly(60, 1, 1), draw_butterfly(60, 2, 0)):
        assert not torch.equal(first.order, other.order) and not torch.equal(first.outer, other.outer)


def test_the_stream_is_the_one_that_files_rely_on() -> None:
    """A seed in a checkpoint names these numbers: they must never change."""
    butterfly = draw_butterfly(6, 0, 0)
    assert butterfly.order.tolist() == ORDER
    torch.testing.assert_close(butterfly.outer, torch.tensor(OUTER), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(butterfly.inner, torch.tensor(INNER), rtol=1e-6, atol=1e-7)


def test_rotations_are_uniform() -> None:
    """Haar: entries have mean 0 and variance 1/n, of either determinant."""
    drawn = torch.stack([draw_butterfly(16, seed).inner for seed in range(400)])
    assert float(drawn.mean(0).abs().max()) < 5 * 0.5 / 20
    torch.testing.assert_close(drawn.square().mean(0), torch.full((4, 4), 0.25), rtol=0, atol=0.08)
    assert 0.4 < float((torch.linalg.det(drawn) > 0).float().mean()) < 0.6


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 12)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    butterfly, x = draw_butterfly(12, 3), gaussian(*shape)
    torch.testing.assert_close(rotate(x, butterfly), x @ dense(butterfly).t())
    assert rotate_back(x, butterfly).shape == x.shape


def test_half_types_are_computed_in_float32() -> None:
    butterfly, x = draw_butterfly(128, 3), gaussian(4, 128).bfloat16()
    assert torch.equal(rotate(x, butterfly), rotate(x.float(), butterfly))
    assert rotate(x.double(), butterfly).dtype == torch.float64


def test_gradients() -> None:
    butterfly, x = draw_butterfly(12, 3), gaussian(4, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, butterfly), x)
    assert torch.autograd.gradcheck(lambda x: rotate_back(x, butterfly), x)


@pytest.mark.parametrize("columns", [576, 4096])
def test_outliers_are_spread(columns: int) -> None:
    """Heavy tails (Student's t of three degrees): the largest entry falls to what a Gaussian matrix' is."""
    rows = 512
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, rows, columns, generator=generator)
    weight = normal[0] / normal[1:].square().mean(0).sqrt()
    mixed = rotate(rotate(weight, draw_butterfly(columns, 0)).t(), draw_butterfly(rows, 1)).t()
    gauss = math.sqrt(2 * math.log(rows * columns))
    assert incoherence(weight) > 30
    assert incoherence(mixed) < 1.25 * gauss, "5.0 and 5.4 are the Gaussian's"


def test_one_outlier_channel_becomes_no_channels() -> None:
    x = gaussian(256, 576)
    x[:, 7] *= 100
    mixed = rotate(x, draw_butterfly(576, 0)).square().mean(0).sqrt()
    before = x.square().mean(0).sqrt()
    assert float(before.max() / before.median()) > 90
    assert float(mixed.max() / mixed.median()) < 20


def test_balancing_gives_weight_and_hessian_the_same_diagonal() -> None:
    weight, x = gaussian(24, 32), gaussian(100, 32, seed=1) * torch.logspace(-1, 1, 32)
    hessian = x.t() @ x / 100
    scale = balancing_scale(weight, hessian)
    power = hessian.diagonal() / scale.square()
    ratio = power / (weight * scale).square().sum(0)
    torch.testing.assert_close(ratio, ratio.mean().expand(32), rtol=1e-4, atol=0)
    torch.testing.assert_close(power.sum(), hessian.diagonal().sum())


@pytest.mark.parametrize("dead", ["input", "column", "all inputs", "all columns"])
def test_balancing_survives_what_is_zero(dead: str) -> None:
    weight, x = gaussian(24, 32), gaussian(100, 32, seed=1)
    part = slice(None) if dead.startswith("all") else slice(3, 4)
    (x if "input" in dead else weight)[:, part] = 0
    scale = balancing_scale(weight, x.t() @ x)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())


def test_the_ridge_is_of_the_mean_diagonal() -> None:
    x = gaussian(100, 32)
    conditioned = with_ridge(7 * x.t() @ x)
    torch.testing.assert_close(conditioned.diagonal().mean(), torch.tensor(1.01))
    v = dense(draw_butterfly(32, 0))
    rotated = v @ (x.t() @ x) @ v.t()
    torch.testing.assert_close(with_ridge(rotated), v @ conditioned @ v.t(), rtol=1e-3, atol=1e-4)
