"""Errors from running sums against errors of rounded values."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import get_format
from hf_lowbit.rounding.sorted_values import SortedValues


def brute_force(x: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    grids = (scale.unsqueeze(-1) * levels + shift.unsqueeze(-1)).double()  # [n, k, l]
    distance = (x.double()[:, None, :, None] - grids[:, :, None, :]).square().amin(-1)
    return distance.sum(-1)


@pytest.mark.parametrize("shifted", [False, True])
def test_errors_are_those_of_rounding(shifted: bool) -> None:
    torch.manual_seed(0)
    x, levels = torch.randn(3, 500), get_format("fp_e2m3", 6).table.unique()
    scale = torch.rand(3, 7) + 0.01
    shift = torch.randn(3, 7) if shifted else torch.zeros(3, 7)
    found = SortedValues.of(x).errors(levels, scale, shift if shifted else None)
    torch.testing.assert_close(found, brute_force(x, levels, scale, shift), rtol=1e-6, atol=1e-9)


def test_counts_stand_for_repeated_values() -> None:
    values, counts = torch.tensor([-1.0, 0.25, 3.0]), torch.tensor([[1, 0, 5], [2, 7, 0]])
    repeated = [values.repeat_interleave(row) for row in counts]
    levels, scale = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0.5, 1.0], [0.5, 1.0]])
    found = SortedValues.of(values, counts).errors(levels, scale)
    for row, x in enumerate(repeated):
        zero = torch.zeros(1, 2)
        torch.testing.assert_close(found[row : row + 1], brute_force(x[None], levels, scale[row : row + 1], zero))


def test_a_scale_of_zero_loses_everything() -> None:
    x = torch.randn(1, 50)
    found = SortedValues.of(x).errors(torch.tensor([0.0, 1.0]), torch.zeros(1, 1))
    torch.testing.assert_close(found, x.double().square().sum().reshape(1, 1))
