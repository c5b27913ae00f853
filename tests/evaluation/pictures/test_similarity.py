"""PSNR, SSIM and the distance in a classifier's maps: known values, and torchmetrics' where it is installed."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.evaluation.pictures import map_distance, psnr, ssim


def test_psnr_of_a_known_error() -> None:
    pictures = torch.full((2, 1, 4, 4), 0.5)
    reference = pictures + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(pictures, reference).tolist() == pytest.approx([20, 40], abs=1e-4)
    assert psnr(pictures, pictures).tolist() == [float("inf")] * 2


def test_ssim_of_equal_and_of_unlike_pictures() -> None:
    pictures = torch.rand(3, 3, 16, 20)
    for window in (11, 3, None):
        assert ssim(pictures, pictures, window).tolist() == pytest.approx([1.0] * 3)
        assert (ssim(pictures, 1 - pictures, window) < 0).all()


def test_global_ssim_by_hand() -> None:
    x, y = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.rand(1, 1, 8, 8, dtype=torch.float64)
    c1, c2 = 0.01**2, 0.03**2
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    expected = (2 * x.mean() * y.mean() + c1) / (x.mean() ** 2 + y.mean() ** 2 + c1)
    expected *= (2 * covariance + c2) / (x.var(correction=0) + y.var(correction=0) + c2)
    assert ssim(x, y, None).item() == pytest.approx(float(expected), rel=1e-9)


def test_window_fits_the_picture() -> None:
    x, y = torch.rand(1, 1, 8, 9), torch.rand(1, 1, 8, 9)
    assert ssim(x, y, 511).item() == ssim(x, y, 7).item()
    with pytest.raises(ValueError, match="odd number"):
        ssim(x, y, 8)
    with pytest.raises(ValueError, match=r"\[n, c, h, w\]"):
        ssim(x, y[:, :, :7])


def test_as_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    reference = torch.rand(4, 3, 32, 32)
    pictures = (reference + 0.1 * torch.randn_like(reference)).clamp(0, 1)
    _, places = functional.structural_similarity_index_measure(
        pictures, reference, data_range=1.0, reduction="none", return_full_image=True
    )
    theirs = places[..., 5:-5, 5:-5].flatten(1).mean(1)  # it mirrors pictures at their border, and counts that too
    assert torch.allclose(ssim(pictures, reference).float(), theirs, atol=1e-5)
    theirs = functional.peak_signal_noise_ratio(pictures, reference, 1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(pictures, reference).float(), theirs, atol=1e-4)


def test_map_distance() -> None:
    maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4)]
    assert map_distance(maps, maps).tolist() == [0, 0]
    assert map_distance([5 * m for m in maps], maps).tolist() == pytest.approx(
        [0, 0], abs=1e-10
    )  # lengths do not count
    x, y = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    x[:, 0], y[:, 1] = 1, 1  # orthogonal everywhere: |f - g|^2 = 2
    assert map_distance([x, x], [y, y]).item() == pytest.approx(4)
    with pytest.raises(ValueError, match="same pictures"):
        map_distance(maps, maps[:1])
