"""Running statistics equal those of all inputs at once."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.statistics import Hessian, Magnitude


def test_hessian_is_the_mean_outer_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 1100)  # wider than the blocks it is computed in
    hessian = Hessian(1100)
    for part in x.split([100, 0, 200]):
        hessian.update(part)
    assert hessian.tokens == 300
    torch.testing.assert_close(hessian.matrix, x.t() @ x / 300, rtol=1e-5, atol=1e-6)
    assert torch.equal(hessian.matrix, hessian.matrix.t())


def test_magnitude_is_mean_and_maximum() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 7)
    magnitude = Magnitude(7)
    for part in x.split([20, 30, 0]):
        magnitude.update(part)
    torch.testing.assert_close(magnitude.mean, x.abs().mean(0))
    assert torch.equal(magnitude.maximum, x.abs().amax(0))
