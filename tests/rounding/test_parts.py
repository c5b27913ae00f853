"""Weights in parts: each part's own grid, and nothing else than groups in what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.formats.packed import scales
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.parts import round_parts

WIDTHS = (32, 16)  # groups of 16, two in the first part
SPEC = WeightSpec(bits=4, group_size=16, symmetric=False, scale_dtype="float32")
ROW = replace(SPEC, group_size=None)


def weight() -> torch.Tensor:
    """The second part is fifty times as large as the first."""
    return torch.randn(8, 48) * torch.tensor([1.0] * 32 + [50.0] * 16)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int", "nf", "fp_e2m1"])
def test_each_part_is_rounded_as_if_alone(format: str, symmetric: bool) -> None:
    spec = replace(SPEC, format=format, symmetric=symmetric)
    w = weight()
    packed = round_parts(w, spec, WIDTHS, round_to_nearest)
    alone = [decode(round_to_nearest(part, replace(spec, group_size=None))) for part in w.split(WIDTHS, 1)]
    assert torch.equal(decode(packed), torch.cat(alone, 1))
    scale = scales(packed)
    assert scale.shape == (8, 3) and torch.equal(scale[:, 0], scale[:, 1]) and not torch.equal(scale[:, 1], scale[:, 2])
    assert packed.tensors().keys() == round_to_nearest(w, spec).tensors().keys()


# 1
def test_parts_of_equal_range_are_no_split() -> None:
    w = torch.randn(8, 48).clamp(-2.9, 2.9)
    w[:, 0], w[:, 1], w[:, 40], w[:, 41] = 3.0, -3.5, 3.0, -3.5  # the extremes of both
    parts, whole = round_parts(w, SPEC, WIDTHS, round_to_nearest), round_to_nearest(w, ROW)
    assert torch.equal(decode(parts), decode(whole))
    assert torch.equal(parts.weight, whole.weight)


# 1
def test_parts_never_lose_more_than_the_whole() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        w = torch.randn(8, 48) * torch.tensor([1.0] * 32 + [float(seed + 1)] * 16)
        w[:, 0] = 4 * (seed + 1)  # so that the whole range is one part's
        steps = scales(round_parts(w, SPEC, WIDTHS, round_to_nearest)), scales(round_to_nearest(w, ROW))
        assert bool((steps[0] <= steps[1] + 1e-6).all())
    w = weight()
    errors = [
        (decode(p) - w)[:, :32].norm()
        for p in (round_parts(w, SPEC, WIDTHS, round_to_nearest), round_to_nearest(w, ROW))
    ]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize(
    ("spec", "widths"),
    [(SPEC, (24, 24)), (SPEC, (32, 32)), (ROW, WIDTHS), (replace(SPEC, format="codebook", symmetric=True), WIDTHS)],
    ids=["straddles", "other width", "no groups", "fitted table"],
)
def test_refusals(spec: WeightSpec, widths: tuple[int, ...]) -> None:
    with pytest.raises(RoundingError, match=r"do not divide parts|codebook"):
        round_parts(weight(), spec, widths, round_to_nearest)
