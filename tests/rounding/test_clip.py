"""Searched ranges: never worse than the whole one by their own measure, group by group, for every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, WeightSpec, decode
from hf_lowbit.rounding import RoundingError, clip, round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped, fit_output_error, fit_range, search_grid
from hf_lowbit.rounding.grid import Grid
from hf_lowbit.rounding.store import format_for, round_to_grid, round_with
from tests.rounding.test_gptq import FORMATS, gaussian, same

ROWS, COLUMNS = 8, 96
every_format = pytest.mark.parametrize("values", FORMATS.values(), ids=FORMATS)
every_group = pytest.mark.parametrize("group_size", [None, "tensor", 16])


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    x = gaussian(*shape, seed=seed, dtype=torch.float32)
    return x * x.abs() + 0.1


def importance_of(columns: int, seed: int = 1) -> Tensor:
    return gaussian(columns, seed=seed, dtype=torch.float32).square()


def grouped_as(weight: Tensor, spec: WeightSpec) -> Tensor:
    if spec.group_size == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.reshape(len(weight), spec.groups(weight.shape[1]), -1)


def rounded(grouped: Tensor, grid: Grid, number_format: NumberFormat) -> Tensor:
    values = number_format.decode(number_format.encode(grid.to_table_units(grouped)))
    return (values - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)


def error_of(weight: Tensor, spec: WeightSpec, grid: Grid, importance: Tensor | None, norm: float = 2.4) -> Tensor:
    """Per group; written out once more, without chunks."""
    grouped, (number_format, _) = grouped_as(weight, spec), format_for(weight, spec)
    difference = (grouped - rounded(grouped, grid, number_format)).abs().double()
    if importance is None:
        return difference.pow(norm).sum(-1)
    return (difference.square() * grouped_as(importance.expand_as(weight), spec)).sum(-1)


@every_format
@every_group
@pytest.mark.parametrize("weighted", [False, True])
def test_never_worse_than_the_whole_range(values: dict[str, Any], group_size: Any, weighted: bool) -> None:
    spec, weight = WeightSpec(group_size=group_size, **values), heavy_tailed(ROWS, COLUMNS)
    importance = importance_of(COLUMNS) if weighted else None
    number_format, _ = format_for(weight, spec)
    whole = fit_range(grouped_as(weight, spec), spec, number_format)
    searched = fit_clipped(grouped_as(weight, spec), spec, number_format, importance)
    before, after = (error_of(weight, spec, grid, importance) for grid in (whole, searched))
    assert after.shape == searched.scale.shape == searched.zero_point.shape
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int3-zero", "int4-real-zero", "nf4", "fp_e2m1"])
def test_outliers_are_clipped(name: str) -> None:
    """One weight of a row far outside the others: their resolution is worth more."""
    spec, weight = WeightSpec(**FORMATS[name]), gaussian(ROWS, 512, dtype=torch.float32)
    weight[:, 7] = 8.0
    ratio = [
        error_of(weight, spec, fit(grouped_as(weight, spec), spec, spec.number_format, None), None).sum()
        for fit in (fit_clipped, fit_range)
    ]
    assert ratio[0] < 0.9 * ratio[1]


@pytest.mark.parametrize("name", ["int3", "nf4", "fp_e2m1", "fitted"])
@every_group
@pytest.mark.parametrize("weighted", [False, True])
def test_each_group_takes_its_best_factor(name: str, group_size: Any, weighted: bool) -> None:
    """Against one factor at a time for all groups, by clamping the weights."""
    spec, weight = WeightSpec(group_size=group_size, **FORMATS[name]), heavy_tailed(ROWS, COLUMNS)
    grouped, (number_format, _) = grouped_as(weight, spec), format_for(weight, spec)
    importance, factors = importance_of(COLUMNS) if weighted else None, (0.9, 0.7, 0.5)
    searched = search_grid(grouped, spec, number_format, importance, factors, norm=3.0)
    largest = grouped.abs().amax(-1, keepdim=True)
    errors = [
        error_of(weight, spec, fit_range(torch.minimum(grouped.abs(), f * largest), spec, number_format), importance, 3)
        for f in (1.0, *factors)
    ]
    best = torch.stack(errors).amin(0)
    found = error_of(weight, spec, searched, importance, 3.0)
    if number_format.is_integer_grid:  # a scale of the other sign may do better still
        assert (found <= best * (1 + 1e-4) + 1e-8).all()
    else:
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-8)
    if group_size == 16:
        assert len(torch.stack(errors).argmin(0).unique()) > 1  # groups differ in it


@pytest.mark.parametrize("name", ["int3-zero", "int4-real-zero", "nf4-zero"])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_end_is_clipped_where_only_it_has_an_outlier(name: str, sign: int) -> None:
    """Both ends by one factor would cost the other end its weights."""
    spec, weight = (
        WeightSpec(**FORMATS[name], scale_dtype="float32"),
        torch.rand(ROWS, 256, generator=torch.Generator().manual_seed(0)),
    )
    weight = sign * (weight * 2 - 1)
    weight[:, 3] = 4.0 * sign
    grouped, importance = grouped_as(weight, spec), torch.ones(256)
    importance[3] = 0.0
    searched = search_grid(grouped, spec, spec.number_format, importance)
    table = spec.number_format.table
    ends = torch.stack([(table[i] - searched.zero_point) * searched.scale for i in (0, -1)])
    assert (ends.amax(0) < 1.5).all() and (ends.amin(0) > -1.5).all()
    assert (ends.amax(0) > 0.8).all() and (ends.amin(0) < -0.8).all()


@every_format
def test_columns_that_matter_are_rounded_better(values: dict[str, Any]) -> None:
    """By the measure that was asked for, a search that knows the importance beats one that does not."""
    spec, weight = WeightSpec(group_size=16, **values), heavy_tailed(32, COLUMNS)
    grouped, (number_format, _) = grouped_as(weight, spec), format_for(weight, spec)
    importance = importance_of(COLUMNS).square()
    knows, not_told = (fit_clipped(grouped, spec, number_format, i) for i in (importance, torch.ones(COLUMNS)))
    assert error_of(weight, spec, knows, importance).sum() < error_of(weight, spec, not_told, importance).sum() * 1.0001


@every_format
@every_group
@pytest.mark.parametrize("kind", ["plain", "weighted", "output"])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], group_size: Any, kind: str
) -> None:
    """A whole matrix that shares one grid is measured in pieces; other grids are searched in chunks of rows."""
    spec, weight = WeightSpec(group_size=group_size, **values), heavy_tailed(ROWS, COLUMNS)
    grouped, (number_format, _) = grouped_as(weight, spec), format_for(weight, spec)
    x = gaussian(200, COLUMNS, dtype=torch.float32)
    fit = fit_output_error(x.t() @ x / 200, spec) if kind == "output" else fit_clipped
    importance = importance_of(COLUMNS) if kind == "weighted" else None
    whole = fit(grouped, spec, number_format, importance)
    monkeypatch.setattr(clip, "_CHUNK_ELEMENTS", 3 * COLUMNS + 5)
    for part, chunked in zip(whole, fit(grouped, spec, number_format, importance), strict=True):
        if group_size == "tensor":  # errors are summed in another order: of two equal factors either may win
            torch.testing.assert_close(part, chunked, rtol=0.03, atol=1e-3)
        else:
            assert torch.equal(part, chunked)


@every_format
@every_group
def test_the_error_of_the_output_is_never_larger(values: dict[str, Any], group_size: Any) -> None:
    """AWQ's measure, computed from the tokens themselves: mean of (sum over a group of x (w_hat - w))^2."""
    spec, weight = WeightSpec(group_size=group_size, **values), heavy_tailed(ROWS, COLUMNS)
    grouped, (number_format, _) = grouped_as(weight, spec), format_for(weight, spec)
    x = gaussian(200, COLUMNS, dtype=torch.float32) @ gaussian(COLUMNS, COLUMNS, dtype=torch.float32)
    errors = []
    for fit in (fit_output_error(x.t() @ x / 200, spec), fit_range):
        grid = fit(grouped, spec, number_format, None)
        difference = (grouped - rounded(grouped, grid, number_format)).reshape(ROWS, spec.groups(COLUMNS), -1)
        output = torch.einsum("tgc,rgc->trg", x.reshape(200, spec.groups(COLUMNS), -1), difference)
        error = output.square().mean(0)
        errors.append(error.sum() if group_size == "tensor" else error)
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    if group_size == 16 and spec.bits < 8:  # eight bits leave nothing to win
        assert errors[0].sum() < errors[1].sum()


# packed
@every_format
@every_group
def test_nearest_codes_on_a_given_grid(values: dict[str, Any], group_size: Any) -> None:
    spec, weight = WeightSpec(group_size=group_size, **values), heavy_tailed(ROWS, COLUMNS)
    number_format, table = format_for(weight, spec)
    grouped = grouped_as(weight, spec)
    grid = fit_range(grouped, spec, number_format)
    packed = round_to_grid(weight, grid, spec, number_format, table)
    assert same(packed, round_to_nearest(weight, spec))
    assert torch.equal(decode(packed), rounded(grouped, grid, number_format).reshape(weight.shape))


@every_format
@every_group
def test_rounding_with_a_search(values: dict[str, Any], group_size: Any) -> None:
    spec, weight = WeightSpec(group_size=group_size, **values), heavy_tailed(ROWS, COLUMNS)
    number_format, table = format_for(weight, spec)
    importance = importance_of(COLUMNS)
    grid = fit_clipped(grouped_as(weight, spec), spec, number_format, importance)
    expected = round_to_grid(weight, grid, spec, number_format, table)
    assert same(round_with(fit_clipped, weight, spec, importance), expected)
    assert same(round_with(fit_range, weight, spec, importance), round_to_nearest(weight, spec))


# edges
@every_format
@pytest.mark.parametrize("constant", [0.0, 0.75, -0.75])
def test_groups_without_a_range_stay_finite_and_close(values: dict[str, Any], constant: float) -> None:
    spec, weight = WeightSpec(group_size=16, **values), torch.full((2, 32), constant)
    clipped, whole = decode(round_with(fit_clipped, weight, spec)), decode(round_to_nearest(weight, spec))
    assert ((clipped - weight).abs() <= (whole - weight).abs() + 1e-6).all()


@pytest.mark.parametrize("name", ["int4", "int4-zero", "nf4-zero", "ternary", "int1-zero"])
def test_a_candidate_that_storage_cannot_hold_is_no_reason_to_refuse(name: str) -> None:
    """float16 holds the scale of the whole range, the least it can, and none of a smaller one."""
    spec = WeightSpec(**FORMATS[name], scale_dtype="float16")
    least = 2.0**-24
    weight = torch.cat([-torch.arange(8.0), torch.arange(8.0)])[None] * least
    grouped = grouped_as(weight, spec)
    factor = least / fit_range(grouped, WeightSpec(**FORMATS[name], scale_dtype="float32"), spec.number_format).scale
    whole = fit_range(grouped * factor, spec, spec.number_format)
    assert whole.scale.item() == least
    with pytest.raises(RoundingError, match="does not fit scale_dtype"):
        fit_range(grouped * factor * 0.3, spec, spec.number_format)
    assert fit_clipped(grouped * factor, spec, spec.number_format).scale.item() >= least


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = heavy_tailed(4, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(RoundingError, match="NaN or infinite"):
        round_with(fit_clipped, weight, WeightSpec())


@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_integers_meet_the_largest_weight_of_either_sign(sign: int) -> None:
    """-4 .. 3 with the fourth value on the side where it is needed: exact for weights that are such integers."""
    grouped = sign * torch.tensor([[[4.0, 3, 2, 1, 0, -1, -2, -3]]])
    spec = WeightSpec(bits=3)
    grid = search_grid(grouped, spec, spec.number_format)
    values = spec.number_format.nearest(grid.to_table_units(grouped)) * grid.scale.unsqueeze(-1)
    assert torch.equal(values, grouped)
