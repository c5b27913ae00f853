"""Distances between sets of features: closed forms, expectations, and what chance alone does."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.evaluation.pictures import (
    GaussianFit,
    fit_gaussian,
    frechet_distance,
    is_within_noise,
    kernel_distance,
    noise_interval,
    paired_interval,
    polynomial_mmd,
)


def spread(*variances: float) -> torch.Tensor:
    return torch.diag(torch.tensor(variances, dtype=torch.float64))


def test_frechet_in_closed_form() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    first = GaussianFit(zero, spread(1, 4))
    # |m|^2 + sum of (s1 - s2)^2 of diagonal covariances
    second = GaussianFit(torch.tensor([3.0, 4.0], dtype=torch.float64), spread(9, 16))
    assert frechet_distance(first, second) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 4) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(20, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = fit_gaussian(a), fit_gaussian(b)
    from scipy.linalg import sqrtm

    root = torch.from_numpy(sqrtm((first.covariance @ second.covariance).numpy()).real)
    expected = (first.mean - second.mean).square().sum() + (first.covariance + second.covariance - 2 * root).trace()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_as_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Means(torch.nn.Module):
        num_features = 6

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures.double().unflatten(2, (2, -1)).mean((3, 4)).flatten(1) / 255  # of two halves, by channel

    theirs = fid.FrechetInceptionDistance(Means()).set_dtype(torch.float64)
    sets = [torch.randint(0, high, (60, 3, 8, 8), dtype=torch.uint8) for high in (200, 250)]
    for real, pictures in zip((True, False), sets, strict=True):
        theirs.update(pictures, real=real)
    first, second = (fit_gaussian(Means()(pictures)) for pictures in sets)
    assert frechet_distance(first, second) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_frechet_of_fewer_pictures_than_features_is_finite() -> None:
    features = torch.randn(4, 32)
    assert frechet_distance(fit_gaussian(features), fit_gaussian(features)) == pytest.approx(0, abs=1e-6)
    moved = fit_gaussian(features + 1)
    assert frechet_distance(fit_gaussian(features), moved) == pytest.approx(32, rel=1e-5)


def test_fit_refuses_what_has_no_spread_or_is_not_finite() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        fit_gaussian(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        fit_gaussian(torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        frechet_distance(fit_gaussian(torch.randn(4, 2)), fit_gaussian(torch.randn(4, 3)))


def test_mmd_by_its_definition() -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [
        sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1)) for z, n in ((x, 5), (y, 4))
    ]
    across = sum(k(a, b) for a in x for b in y) / 20
    assert polynomial_mmd(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_mmd_is_zero_in_expectation_for_equal_distributions() -> None:
    values = torch.tensor([polynomial_mmd(torch.randn(30, 4), torch.randn(30, 4)) for _ in range(300)])
    error = values.std() / len(values) ** 0.5
    assert values.mean().abs() < 3 * error
    assert (values < 0).any()  # which a biased estimate never is


def test_paired_mmd_is_unbiased_too_and_zero_for_equal_pictures() -> None:
    same = torch.randn(20, 4)
    assert polynomial_mmd(same, same, paired=True) == pytest.approx(0, abs=1e-12)
    assert polynomial_mmd(same, same) < -0.1  # what pairs do to the other one
    values = []
    for _ in range(300):  # pairs that are alike, of one distribution
        common = torch.randn(30, 4)
        x, y = (0.5**0.5 * (common + torch.randn(30, 4)) for _ in range(2))
        values.append(polynomial_mmd(x, y, paired=True))
    values = torch.tensor(values)
    assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5


def test_kernel_distance_tells_distributions_apart() -> None:
    x, y, z = torch.randn(200, 4), torch.randn(200, 4), torch.randn(200, 4) + 1
    near, far = kernel_distance(x, y), kernel_distance(x, z)
    assert near.low < 0 < near.high and near.low <= near.value <= near.high
    assert far.low > near.high
    assert kernel_distance(x, z, seed=0) == far != kernel_distance(x, z, seed=1)
    with pytest.raises(ValueError, match="subset_size=201"):
        kernel_distance(x, y, subset_size=201)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(fit_gaussian(a), fit_gaussian(b))


def test_noise_interval_holds_other_seeds_and_not_another_model() -> None:
    sets = [torch.randn(100, 4) for _ in range(3)]
    interval = noise_interval(sets, frechet)
    assert 0 < interval[0] < interval[1]
    inside = sum(is_within_noise(frechet(torch.randn(100, 4), torch.randn(100, 4)), interval) for _ in range(100))
    assert inside > 85
    assert not is_within_noise(frechet(sets[0], 1.3 * torch.randn(100, 4) + 0.3), interval)
    assert is_within_noise(frechet(sets[0], sets[0] + 1e-3), interval)  # nearer than other seeds are


def test_noise_keeps_prompts_together() -> None:
    prompts = torch.arange(50.0).unsqueeze(1) * 100  # far more apart than seeds are
    sets = [prompts + torch.randn(50, 1) for _ in range(2)]
    low, high = noise_interval(sets, lambda a, b: float((a.mean() - b.mean()).abs()), resamples=50)
    assert high < 1 and low >= 0
    with pytest.raises(ValueError, match="at least 2 sets"):
        noise_interval(sets[:1], frechet)


def test_paired_interval_tells_methods_apart() -> None:
    reference = torch.randn(200, 4)
    noise = torch.randn(200, 4)
    near, far = (paired_interval(reference + s * noise, reference, frechet, resamples=100) for s in (0.2, 0.5))
    assert 0 < near[0] < near[1] < far[0] < far[1]
    assert near[0] < frechet(reference + 0.2 * noise, reference) < near[1] * 1.5
    assert paired_interval(reference, reference, frechet, resamples=5) == pytest.approx((0, 0), abs=1e-9)
    with pytest.raises(ValueError, match="no pairs"):
        paired_interval(reference, reference[:9], frechet)
