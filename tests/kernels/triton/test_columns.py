"""The fused sweep over a block of columns against the loop over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import triton
from hf_lowbit.kernels.triton.columns import round_columns
from hf_lowbit.rounding.clip import fit_range
from hf_lowbit.rounding.feedback import Problem, Rounder, pose
from hf_lowbit.rounding.store import to_groups

DEVICE = "cpu" if triton.interpreted() else "cuda"
ROWS, COLUMNS = (37, 16) if triton.interpreted() else (1000, 128)
SPECS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4},
    "int3-zero": {"bits": 3, "symmetric": False},
    "int8-real-zero": {"bits": 8, "symmetric": False, "real_zero_point": True},
    "nf4": {"format": "nf", "bits": 4},
    "fp_e2m1": {"format": "fp_e2m1", "bits": 4},
    "ternary": {"format": "ternary", "bits": 2},
    "binary": {"bits": 1},
}


def posed(act_order: bool) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    return pose(torch.randn(ROWS, COLUMNS, generator=generator), x.t() @ x / 200, 0.01, act_order)


@pytest.mark.parametrize("group_size", (None, "tensor", 8))
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_loop(name: str, group_size: int | str | None) -> None:
    spec = WeightSpec(group_size=group_size, **SPECS[name])
    number_format = spec.number_format
    for act_order in (False, True):
        problem = posed(act_order)
        grouped = problem.weight.reshape(1, 1, -1) if group_size == "tensor" else to_groups(problem.weight, spec)
        grid = fit_range(grouped, spec, number_format)
        order = torch.arange(COLUMNS) if problem.order is None else problem.order
        work = problem.weight[:, order].t().contiguous()
        expected, errors = Rounder(problem, grid, number_format).round_block(work.clone(), problem.factor, 0)
        integers = number_format.is_integer_grid
        levels, boundaries = number_format.levels
        scale, zero = (part.t().contiguous().to(DEVICE) for part in grid)
        groups = (order // (COLUMNS // grid.scale.shape[1])).int()
        values, own_errors = round_columns(
            work.to(DEVICE), problem.factor.to(DEVICE), scale, zero, groups.to(DEVICE),
            (levels[[0, -1]] if integers else levels).to(DEVICE), None if integers else boundaries.to(DEVICE),
        )  # fmt: skip
        same = (values.cpu() == expected).all(0)  # rows; a half that falls the other way changes what comes after it
        assert same.all() if triton.interpreted() else same.float().mean() > 0.99
        torch.testing.assert_close(own_errors.cpu()[:, same], errors[:, same], rtol=1e-4, atol=5e-5)


def test_halves_go_to_even_and_what_is_beyond_saturates() -> None:
    work = torch.tensor([[-9.0, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3e9]], device=DEVICE)
    one, none = torch.ones(1, 8, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([-8.0, 7.0], device=DEVICE)
    values, _ = round_columns(work, torch.ones(1, 1, device=DEVICE), one, 0 * one, none, ends, None)
    assert values.tolist() == [[-8.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 7.0]]
