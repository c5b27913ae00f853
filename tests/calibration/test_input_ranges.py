"""The search of static ranges: it finds what trying all of them on the inputs themselves finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lowbit.calibration.fitting import fit_range
from hf_lowbit.calibration.input_histogram import InputHistogram
from hf_lowbit.calibration.input_ranges import search_range
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import integer_grid, quantize_tokens, restore_tokens

SPECS = {
    "asymmetric": ActivationSpec("int", 4, symmetric=False, static=True),
    "symmetric": ActivationSpec("int", 4, static=True),
    "float8": ActivationSpec("float8_e4m3fn", 8, static=True),
}


def histogram_of(x: Tensor, groups: int = 1) -> InputHistogram:
    histogram = InputHistogram((groups,))
    histogram.update(x)
    return histogram


def loss(x: Tensor, spec: ActivationSpec, scale: Tensor, shift: Tensor | None) -> float:
    read = restore_tokens(*quantize_tokens(x, spec, scale, shift))
    return float((read - x).double().abs().pow(2.4).sum())


def heavy_tailed(columns: int = 32) -> Tensor:
    """More positive than negative, with a few values far out."""
    return torch.nn.functional.silu(torch.randn(200, columns)) * torch.randn(200, columns).abs().exp()


@pytest.mark.parametrize("name", ["asymmetric", "symmetric"])
def test_it_is_the_best_of_the_eighty(name: str) -> None:
    spec, x = SPECS[name], heavy_tailed()
    _, scale, shift = search_range(histogram_of(x), spec)
    losses = []
    for step in range(80):
        factor = 1 - 0.01 * step
        if name == "symmetric":
            losses.append(loss(x, spec, (factor * x.abs().max() / spec.limit)[None], None))
        else:
            grid = integer_grid(factor * x.min(), factor * x.max(), spec.bits)
            losses.append(loss(x, spec, grid[0][None], grid[1][None]))
    assert loss(x, spec, scale, shift) <= 1.002 * min(losses)
    assert min(losses) < 0.7 * losses[0], "clipping was meant to help"


@pytest.mark.parametrize("name", SPECS)
def test_it_never_loses_more_than_the_whole_range(name: str) -> None:
    spec = SPECS[name]
    for x in (heavy_tailed(), torch.rand(100, 8), -torch.rand(100, 8), torch.ones(10, 8)):
        histogram = histogram_of(x)
        searched, whole = search_range(histogram, spec)[1:], fit_range(histogram, spec)[1:]
        assert loss(x, spec, *searched) <= 1.01 * loss(x, spec, *whole) + 1e-6


def test_timesteps_and_groups_are_searched_each_by_itself() -> None:
    spec = replace(SPECS["asymmetric"], group_size=8, timesteps=(9, 4))
    histogram = InputHistogram((2, 3))
    parts = [heavy_tailed(24), 5 * torch.rand(50, 24)]
    parts[1][:, 8:16] = 0
    for index, x in enumerate(parts):
        histogram.update(x, index)
    completed, scale, shift = search_range(histogram, spec)
    assert completed == spec and scale.shape == (2, 3) and shift is not None and shift.shape == (2, 3)
    assert (scale[1, 1], shift[1, 1]) == (1, 0), "a group of zeros beside others"
    for index, x in enumerate(parts):
        for group in (0, 2):
            alone = search_range(histogram_of(x[:, 8 * group :][:, :8]), SPECS["asymmetric"])
            torch.testing.assert_close(scale[index, group], alone[1][0])
