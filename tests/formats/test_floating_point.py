"""Small floating-point formats: the codebooks of the paper, rounding by arithmetic, and what may be asked for."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec, get_format
from hf_lowbit.formats.floating_point import SPLITS, USUAL_SPLIT, FloatingPoint, floating_point, unsigned_splits

SIGNED = [name for names in SPLITS.values() for name in names]
UNSIGNED = [name for bits in SPLITS for name in unsigned_splits(bits)]


def split_of(name: str) -> FloatingPoint:
    split = floating_point(name)
    assert split is not None
    return split


def dense(limit: float) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(20_000)
    return torch.cat([x * limit / 3, x, x * 1e-3, torch.linspace(-1.5 * limit, 1.5 * limit, 4001)])


# 1
@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("fp_e1m2", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
        ("fp_e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("fp_e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
    ],
)
def test_four_bit_codebooks(name: str, positive: list[float]) -> None:
    split = split_of(name)
    reached = split.round(torch.linspace(-20, 20, 100_001)).unique() + 0.0
    assert reached.unique().tolist() == sorted({*positive, *(-value for value in positive)})


# 1
@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_rounding_is_a_projection_to_the_nearest_value(name: str) -> None:
    split, number_format = split_of(name), get_format(name, split_of(name).bits)
    x = dense(split.limit)
    rounded = split.round(x)
    assert split.limit == number_format.max_value
    assert torch.equal(split.round(rounded), rounded)
    distance = (x.unsqueeze(1) - number_format.table.unique()).abs().amin(1)
    assert torch.equal((x - rounded).abs(), distance)
    if split.mantissa_bits:  # the same ties, too: to even codes
        assert torch.equal(rounded + 0.0, number_format.nearest(x) + 0.0)
    if split.signed:
        assert torch.equal(split.round(-x), -rounded)
    else:
        assert rounded.min() == 0


@pytest.mark.parametrize("name", SIGNED)
def test_errors_are_at_most_half_a_step(name: str) -> None:
    split = split_of(name)
    x = dense(split.limit)
    x = x[x.abs() <= split.limit]
    bias = 2 ** (split.exponent_bits - 1) - 1
    exponent = torch.floor(torch.log2(x.double().abs()) + bias).clamp(min=1)  # log2(0) is absorbed
    step = torch.exp2(exponent - split.mantissa_bits - bias)
    assert ((x.double() - split.round(x).double()).abs() <= step / 2).all()


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_bfloat16_holds_every_value(name: str) -> None:
    table = get_format(name, split_of(name).bits).table
    assert torch.equal(table.bfloat16().float(), table)


# 2
def test_e1m2_is_the_symmetric_int4_grid() -> None:
    x = dense(3.5)
    assert torch.equal(split_of("fp_e1m2").round(x), (2 * x).round().clamp(-7, 7) / 2)


def test_what_is_not_finite_saturates_or_stays() -> None:
    rounded = split_of("fp_e4m3").round(torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-45]))
    assert rounded[:2].tolist() == [480, -480] and rounded[2].isnan() and rounded[3] == 0


@pytest.mark.parametrize("bits", SPLITS)
def test_unsigned_formats_give_the_sign_bit_to_mantissa_or_exponent(bits: int) -> None:
    for name in unsigned_splits(bits):
        split = split_of(name)
        assert split.bits == bits and not split.signed
        assert (
            floating_point(f"fp_e{split.exponent_bits}m{split.mantissa_bits - 1}") is not None
            or split.exponent_bits > 2
        )
        assert get_format(name, bits).table.min() == 0 and len(get_format(name, bits).table.unique()) == 2**bits


def test_an_open_weight_format_has_shapes_and_no_table() -> None:
    spec = WeightSpec("fp", 4, 16)
    assert spec.is_open and spec.companions((8,), 64) == WeightSpec("fp_e2m1", 4, 16).companions((8,), 64)
    with pytest.raises(ValueError, match="format 'fp' leaves exponent and mantissa open: name them"):
        spec.number_format  # noqa: B018
    assert WeightSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "fp", "bits": 3}, "format 'fp' allows 4 to 8 bits, not bits=3"),
        ({"format": "fp", "symmetric": False}, "format 'fp' is symmetric"),
        ({"format": "ufp_e2m2"}, "format 'ufp_e2m2' has no negative values"),
    ],
)
def test_weights_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        WeightSpec(**values)  # type: ignore[arg-type]


def test_inputs() -> None:
    assert ActivationSpec("ufp_e3m5", 8).limit == split_of("ufp_e3m5").limit
    for bits, name in USUAL_SPLIT.items():
        assert ActivationSpec("fp", bits).format == name
        opened = ActivationSpec("fp", bits, static=True)
        assert opened.is_open and opened.limit == split_of(name).limit
        assert ActivationSpec.from_dict(opened.to_dict()) == opened


@pytest.mark.parametrize(
    ("format", "bits"), [("fp", 3), ("fp", 9), ("fp_e4m3", 6), ("fp_e6m1", 8), ("fp_e0m5", 6), ("ufp_e1m1", 2)]
)
def test_inputs_that_are_refused(format: str, bits: int) -> None:
    with pytest.raises(SpecError, match=f"not to '{format}' with {bits} bits"):
        ActivationSpec(format, bits)
