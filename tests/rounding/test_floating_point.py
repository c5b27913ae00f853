"""The search of split and clipping value: the reference table of its method page, and what it may never do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.formats.floating_point import SPLITS
from hf_lowbit.rounding import RoundingError, relative_error, round_to_nearest
from hf_lowbit.rounding.completing import round_completely
from hf_lowbit.rounding.floating_point import CLIPS, round_floating_point, search_grid

SAMPLES = {
    "gaussian": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "student": torch.distributions.StudentT(4.0),
}


def sample(name: str) -> Tensor:
    torch.manual_seed({"student": 0}.get(name, 1))  # without a value far beyond the others
    return SAMPLES[name].sample((256, 256))


def decibels(weight: Tensor, spec: WeightSpec) -> float:
    error = (weight.double() - decode(round_floating_point(weight, spec)).double()).square().sum()
    return float(10 * torch.log10(weight.double().square().sum() / error))


# The table of the page, measured per tensor on 65,536 values; what depends on a sample's largest value is left out.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gaussian", {"fp_e1m2": 18.84, "fp_e2m1": 18.92, "fp_e3m0": 14.25, "fp_e2m5": 42.6, "fp_e3m4": 37.6}),
        ("gaussian", {"fp_e4m3": 31.6, "fp_e5m2": 25.6}),
        ("laplace", {"fp_e1m2": 15.63, "fp_e2m1": 17.31, "fp_e3m0": 14.23, "fp_e2m5": 39.9, "fp_e3m4": 37.7}),
        ("laplace", {"fp_e4m3": 31.6, "fp_e5m2": 25.7}),
        ("student", {"fp_e1m2": 12.37, "fp_e2m1": 14.30, "fp_e3m0": 14.19, "fp_e3m4": 37.7}),
        ("student", {"fp_e4m3": 31.6, "fp_e5m2": 25.6}),
    ],
)
def test_signal_to_noise_is_that_of_the_page(name: str, expected: dict[str, float]) -> None:
    weight = sample(name)
    for split, value in expected.items():
        bits = 4 if value < 20 else 8
        found = decibels(weight, WeightSpec(split, bits, "tensor", scale_dtype="float32"))
        assert found == pytest.approx(value, abs=0.3), split


# 3
def test_wide_exponents_do_not_mind_the_distribution() -> None:
    for split, spread in (("fp_e4m3", 0.3), ("fp_e5m2", 0.3)):
        found = [decibels(sample(name), WeightSpec(split, 8, "tensor")) for name in SAMPLES]
        assert max(found) - min(found) < spread
    falling = [decibels(sample(name), WeightSpec("fp_e2m5", 8, "tensor")) for name in SAMPLES]
    assert falling[0] > falling[1] + 1 > falling[2] + 2


def test_the_split_follows_the_tails() -> None:
    found = {name: round_floating_point(sample(name), WeightSpec("fp", 8, "tensor")).spec.format for name in SAMPLES}
    assert found == {"gaussian": "fp_e2m5", "laplace": "fp_e2m5", "student": "fp_e3m4"}


@pytest.mark.parametrize("bits", SPLITS)
@pytest.mark.parametrize("group", ["tensor", None, 16])
def test_the_search_is_at_least_as_good_as_every_split_alone(bits: int, group: int | str | None) -> None:
    """Within the resolution of the vote where rows or groups have scales of their own: it counts rows, not errors."""
    weight = sample("laplace")[:32]
    packed = round_floating_point(weight, WeightSpec("fp", bits, group))  # type: ignore[arg-type]
    assert packed.spec.format in SPLITS[bits] and not packed.spec.is_open
    for name in SPLITS[bits]:
        alone = round_floating_point(weight, replace(packed.spec, format=name))
        slack = 1.0 if group == "tensor" else 1.1
        assert relative_error(weight, packed) <= slack * relative_error(weight, alone)


# 2
@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_never_worse_than_symmetric_integers_on_the_same_clips(name: str) -> None:
    weight = sample(name)
    packed = round_floating_point(weight, WeightSpec("fp", 4, "tensor", scale_dtype="float32"))
    steps = torch.tensor(CLIPS) * weight.abs().max() / 7
    integers = min(
        float((weight - (weight / step).round().clamp(-7, 7) * step).norm() / weight.norm()) for step in steps
    )
    assert relative_error(weight, packed) <= integers + 1e-6


@pytest.mark.parametrize("columns", [40, 6000])
def test_both_ways_of_measuring_find_the_same_scales(columns: int) -> None:
    """Short rows are rounded, long ones looked up in running sums; here against every clip of every row, rounded."""
    torch.manual_seed(2)
    weight, spec = torch.randn(3, columns), WeightSpec("fp_e2m3", 6, None, scale_dtype="float32")
    _, grid = search_grid(weight, spec)
    for row in range(3):
        largest = weight[row].abs().max() / spec.number_format.max_value
        scales = largest * torch.tensor(CLIPS)
        errors = [float((weight[row] - spec.number_format.nearest(weight[row] / s) * s).square().sum()) for s in scales]
        chosen = float(
            (weight[row] - spec.number_format.nearest(weight[row] / grid.scale[row]) * grid.scale[row]).square().sum()
        )
        assert chosen <= 1.02 * min(errors)


def test_rows_vote_for_the_split() -> None:
    torch.manual_seed(3)
    tails = torch.distributions.StudentT(1.5).sample((3, 4096))
    weight = torch.cat([100 * tails[:1], torch.randn(4, 4096), torch.zeros(9, 4096)])
    assert search_grid(weight, WeightSpec("fp", 8))[0] == "fp_e2m5", "four normal rows against one; zeros do not count"
    assert search_grid(torch.cat([weight, tails, tails, tails]), WeightSpec("fp", 8))[0] != "fp_e2m5"


def test_zeros_stay_zeros() -> None:
    packed = round_floating_point(torch.zeros(4, 32), WeightSpec("fp", 4))
    assert not decode(packed).any() and packed.spec.format == "fp_e1m2"


@pytest.mark.parametrize("group", [None, "tensor", 16])
def test_experts_share_the_split(group: int | str | None) -> None:
    weight = torch.stack([sample("laplace")[:24, :64] * scale for scale in (1.0, 3.0)])
    packed = round_floating_point(weight, WeightSpec("fp", 4, group))  # type: ignore[arg-type]
    for index, matrix in enumerate(weight):
        alone = round_floating_point(matrix, packed.spec)
        assert torch.equal(decode(packed[index]), decode(alone))


def test_scales_that_storage_cannot_hold_are_no_candidates() -> None:
    weight = sample("gaussian")[:4] * 1e-4
    packed = round_floating_point(weight, WeightSpec("fp", 8, scale_dtype="float16"))
    assert relative_error(weight, packed) < 0.02
    with pytest.raises(RoundingError, match="scales do not fit scale_dtype='float16'"):
        round_floating_point(weight, WeightSpec("fp_e5m2", 8, scale_dtype="float16"))


def test_refusals() -> None:
    with pytest.raises(RoundingError, match="NaN or infinite"):
        round_floating_point(torch.tensor([[1.0, torch.nan]]), WeightSpec("fp", 4))
    with pytest.raises(RoundingError, match="symmetric formats 'fp'"):
        round_floating_point(torch.randn(2, 8), WeightSpec("int", 4))


def test_open_specifications_are_completed() -> None:
    weight = sample("gaussian")[:8]
    assert round_completely(weight, WeightSpec("fp", 4)).spec.format in SPLITS[4]
    assert round_completely(weight, WeightSpec("power", 4)).spec.exponent is not None
    nearest = round_completely(weight, WeightSpec("fp_e2m1", 4))
    assert torch.equal(decode(nearest), decode(round_to_nearest(weight, WeightSpec("fp_e2m1", 4))))
