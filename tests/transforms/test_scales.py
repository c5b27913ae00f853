"""SmoothQuant's and AWQ's scales: the properties that their papers promise."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.transforms import FoldError, activation_scale, smoothing_scale


def _ranges() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator) * torch.logspace(-2, 2, 32)
    w = torch.randn(20, 32, generator=generator)
    return x, w


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_balances_the_ranges(alpha):
    """absmax(X / s) = a^(1-alpha) w^(1-alpha), absmax(W s) = (a w)^alpha: equal at 1/2, one of them 1 at the ends."""
    x, w = _ranges()
    a, m = x.abs().amax(0), w.abs().amax(0)
    s = smoothing_scale(a, m, alpha)
    assert s.dtype == torch.float32
    smoothed, columns = (x / s).abs().amax(0), (w * s).abs().amax(0)
    assert torch.allclose(smoothed, (a * m) ** (1 - alpha), rtol=1e-5)
    assert torch.allclose(columns, (a * m) ** alpha, rtol=1e-5)
    if alpha == 0.5:
        assert torch.allclose(smoothed, columns, rtol=1e-5)
    if alpha == 1:
        assert torch.allclose(smoothed, torch.ones(32), rtol=1e-5)
    if alpha == 0:
        assert torch.allclose(columns, torch.ones(32), rtol=1e-5)


def test_smoothing_leaves_dead_channels_and_stays_in_range():
    s = smoothing_scale(torch.tensor([0.0, 1e-30, 1e30, 4.0]), torch.tensor([2.0, 1.0, 0.0, 0.0]), 0.5)
    assert s[0] == 1
    assert s[1] == torch.tensor(1e-5) and s[2] == torch.tensor(1e5)
    assert torch.isclose(s[3], torch.tensor((4.0 / 1e-5) ** 0.5))


def test_awq_scale_is_normalised():
    a = _ranges()[0].abs().mean(0)
    for n in range(20):
        s = activation_scale(a, n / 20)
        assert torch.isclose(s.max() * s.min(), torch.tensor(1.0), rtol=1e-5)
    assert torch.equal(activation_scale(a, 0.0), torch.ones(32))
    assert bool((activation_scale(a, 0.5).diff().sign() == a.diff().sign()).all()), "larger inputs, larger scales"


def test_awq_scale_of_equal_channels_is_one():
    for n in range(20):
        assert torch.allclose(activation_scale(torch.full((16,), 0.37), n / 20), torch.ones(16), rtol=1e-6)


def test_awq_scale_of_a_dead_channel_is_bounded():
    s = activation_scale(torch.tensor([0.0, 1.0]), 0.5)
    assert torch.allclose(s, torch.tensor([1e-2, 1e2]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: smoothing_scale(torch.ones(4), torch.ones(4), 1.5),
        lambda: smoothing_scale(torch.ones(4), torch.ones(5), 0.5),
        lambda: smoothing_scale(torch.tensor([float("nan")]), torch.ones(1), 0.5),
        lambda: smoothing_scale(-torch.ones(4), torch.ones(4), 0.5),
        lambda: activation_scale(torch.ones(4, 4), 0.5),
        lambda: activation_scale(torch.ones(4), -0.1),
        lambda: activation_scale(torch.ones(0), 0.1),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(FoldError):
        call()
