"""Round to nearest: the numbered tests of its method page, and what every format and granularity promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.formats import NumberFormat, PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales, table_of, zero_points
from hf_lowbit.rounding import RoundingError, relative_error, round_to_nearest, store

properties = settings(deadline=None, derandomize=True, max_examples=40)
FORMATS: list[dict[str, Any]] = [
    *[{"format": "int", "bits": bits} for bits in (1, 2, 3, 4, 8)],
    {"format": "nf", "bits": 4},
    {"format": "fp_e2m1", "bits": 4},
    {"format": "float8_e4m3fn", "bits": 8},
    {"format": "power", "bits": 4, "exponent": 0.5},
    {"format": "ternary", "bits": 2},
    {"format": "codebook", "bits": 3},
]
every_format = pytest.mark.parametrize("values", FORMATS, ids=lambda v: f"{v['format']}-{v['bits']}")
every_symmetry = pytest.mark.parametrize("symmetric", [True, False])
every_grid = pytest.mark.parametrize(
    ("values", "symmetric"),
    [
        (values, symmetric)
        for values in FORMATS
        for symmetric in (True, False)
        if symmetric or values["format"] != "ternary"
    ],
    ids=lambda v: f"{v['format']}-{v['bits']}" if isinstance(v, dict) else f"symmetric={v}",
)
every_group = pytest.mark.parametrize("group_size", [None, "tensor", 16])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns, packed.spec.packing)


def make_spec(values: dict[str, Any], **more: Any) -> WeightSpec:
    return WeightSpec(**values, **more)


def mean_square_error(weight: Tensor, spec: WeightSpec) -> float:
    return (weight - decode(round_to_nearest(weight, spec))).square().mean().item()


def per_weight(companion: Tensor, shape: torch.Size) -> Tensor:
    """One value per group, spread over the weights."""
    return (
        companion.unsqueeze(-1)
        .expand(-1, -1, shape[1] // companion.shape[1])
        .reshape(companion.shape[0], -1)
        .expand(shape)
    )


# 1
@properties
@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), group_size=st.sampled_from([None, "tensor", 8]),
    offset=st.floats(-2, 2), size=st.floats(1e-3, 1e3), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_integer_error_is_at_most_half_a_step(
    bits: int, symmetric: bool, group_size: Any, offset: float, size: float, seed: int
) -> None:
    weight = (gaussian(4, 24, seed=seed) + offset) * size
    packed = round_to_nearest(weight, WeightSpec("int", bits, group_size, symmetric, scale_dtype="float32"))
    scale = per_weight(scales(packed), weight.shape)
    assert ((weight - decode(packed)).abs() <= scale * (0.5 + 1e-4)).all()


@properties
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 2**20))
def test_rounded_scales_cost_at_most_their_own_rounding(bits: int, symmetric: bool, seed: int) -> None:
    """A scale that bfloat16 rounded down puts the largest weights outside the grid by that relative error at most."""
    weight = gaussian(4, 24, seed=seed)
    packed = round_to_nearest(weight, WeightSpec("int", bits, 8, symmetric))
    scale = per_weight(scales(packed), weight.shape)
    steps = 2**bits - 1
    assert ((weight - decode(packed)).abs() <= scale * (0.5 + steps * 2.0**-8)).all()


# 2
@every_grid
@every_group
def test_rounding_is_idempotent_on_its_grid(values: dict[str, Any], symmetric: bool, group_size: Any) -> None:
    spec = make_spec(values, group_size=group_size, symmetric=symmetric)
    packed = round_to_nearest(gaussian(8, 48), spec)
    number_format = (
        NumberFormat("codebook", spec.bits, table_of(packed)) if spec.has_fitted_table else spec.number_format
    )
    zero, scale = zero_points(packed), per_weight(scales(packed), torch.Size((8, 48)))
    units = decode(packed) / scale + (0 if zero is None else per_weight(zero, torch.Size((8, 48))))
    again = number_format.decode(number_format.encode(units))
    assert torch.equal(again, number_format.decode(codes_of(packed)))


# 3
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_bit_divides_the_error_of_uniform_weights_by_four(symmetric: bool) -> None:
    weight = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = [mean_square_error(weight, WeightSpec("int", bits, symmetric=symmetric)) for bits in range(2, 8)]
    for coarse, fine in pairwise(errors):
        assert 3.2 < coarse / fine < 5.6


def test_more_bits_never_hurt_gaussian_weights() -> None:
    errors = [mean_square_error(gaussian(32, 128), WeightSpec("int", bits)) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


# 4
@every_symmetry
def test_smaller_groups_have_smaller_scales(symmetric: bool) -> None:
    weight = gaussian(8, 64)
    whole, halves, eighths = (
        per_weight(scales(round_to_nearest(weight, WeightSpec("int", 4, g, symmetric))), weight.shape)
        for g in (None, 32, 8)
    )
    assert (halves <= whole).all() and (eighths <= halves).all() and (eighths < whole).any()


# 5
@every_format
def test_codes_are_at_most_two_to_the_bits(values: dict[str, Any]) -> None:
    packed = round_to_nearest(gaussian(64, 512), make_spec(values))
    expected = 3 if values["format"] == "ternary" else 2 ** values["bits"]
    used = codes_of(packed).unique().tolist()
    assert max(used) < expected
    assert all(len(row.unique()) <= expected for row in decode(packed))
    assert values["bits"] == 8 or len(used) >= expected - 1  # power and E2M1 repeat a value


# 7
@pytest.mark.parametrize(
    ("values", "symmetric"),
    [
        *[(values, True) for values in FORMATS if values["format"] != "codebook" and values["bits"] > 1],
        *[(values, False) for values in FORMATS if values["format"] == "int" and values["bits"] > 1],
    ],
)
def test_zero_weights_stay_exactly_zero(values: dict[str, Any], symmetric: bool) -> None:
    """Wherever the table has a zero and the grid an integer zero point, or none."""
    spec = make_spec(values, symmetric=symmetric, group_size=16)
    weight = gaussian(8, 64)
    weight[:, ::5] = 0.0
    assert (decode(round_to_nearest(weight, spec))[:, ::5] == 0).all()


def test_a_fitted_codebook_keeps_the_zeros_of_a_sparse_weight() -> None:
    weight = gaussian(16, 64) * (gaussian(16, 64, seed=1) > 0)
    decoded = decode(round_to_nearest(weight, WeightSpec("codebook", 4)))
    assert decoded[weight == 0].abs().max() < 0.05 * weight.abs().max()


@properties
@given(low=st.floats(0.5, 3), seed=st.integers(0, 999))
def test_asymmetric_range_contains_zero(low: float, seed: int) -> None:
    """GPTQ's convention: a group of positive weights still has its zero point inside the grid."""
    weight = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed)) + low
    packed = round_to_nearest(weight, WeightSpec("int", 4, symmetric=False))
    zero = zero_points(packed)
    assert zero is not None and (zero == -8).all()
    assert (decode(packed) > 0).all()


# 8
@every_format
@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_are_independent(values: dict[str, Any], group_size: Any) -> None:
    spec = make_spec(values, group_size=group_size)
    weight = gaussian(8, 48)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode(round_to_nearest(weight[order], spec)), decode(round_to_nearest(weight, spec))[order])


# groups without a range
@every_grid
@every_group
def test_an_all_zero_weight_decodes_to_zero(values: dict[str, Any], symmetric: bool, group_size: Any) -> None:
    spec = make_spec(values, symmetric=symmetric, group_size=group_size)
    assert (decode(round_to_nearest(torch.zeros(4, 32), spec)) == 0).all()


@every_grid
@pytest.mark.parametrize("constant", [0.75, -0.75])
def test_a_constant_weight_stays_close(values: dict[str, Any], symmetric: bool, constant: float) -> None:
    spec = make_spec(values, symmetric=symmetric, group_size=16)
    decoded = decode(round_to_nearest(torch.full((4, 32), constant), spec))
    # symmetric integers place absmax half a step beyond their largest value
    half_a_step = 0.5 / (2 ** (values["bits"] - 1) - 0.5) if values["format"] == "int" and values["bits"] > 1 else 0.0
    assert torch.allclose(decoded, torch.full((4, 32), constant), rtol=half_a_step + 2.0**-7)


@every_format
def test_a_zero_group_beside_others_does_not_disturb_them(values: dict[str, Any]) -> None:
    spec = make_spec(values, group_size=16)
    weight = gaussian(4, 32)
    weight[1, :16] = 0
    decoded = decode(round_to_nearest(weight, spec))
    assert (decoded[1, :16] == 0).all() and torch.isfinite(decoded).all()


# refusals
@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(values: dict[str, Any], bad: float) -> None:
    weight = gaussian(4, 32)
    weight[2, 7] = bad
    with pytest.raises(RoundingError, match="NaN or infinite"):
        round_to_nearest(weight, make_spec(values))


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_a_scale_beyond_float16_is_refused_and_the_fix_is_named(size: float) -> None:
    weight = gaussian(4, 32) * size
    spec = WeightSpec(scale_dtype="float16")
    with pytest.raises(RoundingError, match="does not fit scale_dtype='float16'; use scale_dtype='bfloat16'"):
        round_to_nearest(weight, spec)
    assert relative_error(weight, round_to_nearest(weight, replace(spec, scale_dtype="bfloat16"))) < 0.15


def test_a_vanishing_zero_point_is_no_reason_to_refuse() -> None:
    weight = torch.tensor([[-1.0, 1 - 2.0**-24, 0.3, 0.0]])
    packed = round_to_nearest(weight, WeightSpec("nf", 4, symmetric=False, scale_dtype="float16"))
    zero = zero_points(packed)
    assert zero is not None and zero.item() == 0


def test_the_group_must_divide_the_columns() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        round_to_nearest(gaussian(4, 30), WeightSpec(group_size=16))


# stacks
@every_grid
@every_group
def test_experts_are_rounded_each_on_its_own(values: dict[str, Any], symmetric: bool, group_size: Any) -> None:
    spec = make_spec(values, symmetric=symmetric, group_size=group_size)
    weight = gaussian(3, 6, 32) * torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1)
    if spec.has_fitted_table:
        with pytest.raises(RoundingError, match="fitted codebook"):
            round_to_nearest(weight, spec)
        return
    packed = round_to_nearest(weight, spec)
    for expert in range(3):
        alone = round_to_nearest(weight[expert], spec)
        assert torch.equal(decode(packed[expert]), decode(alone))
        assert torch.equal(decode(packed)[expert], decode(alone))


# conventions that the code states
def test_one_bit_is_sign_times_mean() -> None:
    weight = gaussian(4, 64)
    packed = round_to_nearest(weight, WeightSpec("int", 1, scale_dtype="float32"))
    assert torch.allclose(decode(packed), weight.sign() * weight.abs().mean(1, keepdim=True))


def test_ternary_scale_is_the_mean_of_the_kept_weights() -> None:
    weight = gaussian(4, 64)
    kept = weight.abs() > 0.7 * weight.abs().mean(1, keepdim=True)
    expected = (weight.abs() * kept).sum(1) / kept.sum(1)
    packed = round_to_nearest(weight, WeightSpec("ternary", 2, scale_dtype="float32"))
    assert torch.allclose(scales(packed).flatten(), expected)
    twn = expected.unsqueeze(1) * weight.sign() * kept
    assert (weight - decode(packed)).square().sum() <= (weight - twn).square().sum()


def test_symmetric_integers_use_the_full_range() -> None:
    weight = gaussian(4, 64)
    packed = round_to_nearest(weight, WeightSpec("int", 4, scale_dtype="float32"))
    assert torch.allclose(scales(packed).flatten(), weight.abs().amax(1) / 7.5)


@pytest.mark.parametrize("values", [FORMATS[5], FORMATS[6], FORMATS[8]], ids=["nf", "e2m1", "power"])
def test_the_largest_table_value_meets_the_absmax(values: dict[str, Any]) -> None:
    weight = gaussian(4, 64)
    spec = make_spec(values, scale_dtype="float32")
    packed = round_to_nearest(weight, spec)
    assert torch.allclose(scales(packed).flatten() * spec.number_format.max_value, weight.abs().amax(1))


# fitted codebooks
@pytest.mark.parametrize("group_size", [None, 64, "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_codebook_beats_nf_at_equal_bits(bits: int, group_size: Any) -> None:
    """On what it minimises, the squared error of the weights, for weights of several shapes."""
    skewed = gaussian(64, 256).exp() - 1.5
    for weight in (gaussian(64, 256), skewed, torch.rand(64, 256) - 0.5):
        fitted = mean_square_error(weight, WeightSpec("codebook", bits, group_size))
        assert fitted < mean_square_error(weight, WeightSpec("nf", bits, group_size))


def test_an_asymmetric_codebook_is_fitted_around_the_middle_of_the_range() -> None:
    weight = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) + 1
    fitted = relative_error(weight, round_to_nearest(weight, WeightSpec("codebook", 4, symmetric=False)))
    assert fitted < 0.02


def test_fitting_is_deterministic() -> None:
    spec = WeightSpec("codebook", 3)
    first, second = round_to_nearest(gaussian(16, 64), spec), round_to_nearest(gaussian(16, 64), spec)
    assert all(torch.equal(tensor, second.tensors()[suffix]) for suffix, tensor in first.tensors().items())


def test_a_given_codebook_is_laid_on_its_largest_value() -> None:
    """Also when its values are consecutive integers: that does not make it the integer format."""
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec("codebook", 2, codebook=(0.0, 1.0, 2.0, 3.0), scale_dtype="float32")
    packed = round_to_nearest(weight, spec)
    scale = scales(packed)
    assert torch.allclose(scale.flatten() * 3, weight.amax(1))
    assert ((weight - decode(packed)).abs() <= scale * 0.5001).all()


# memory
@every_grid
@every_group
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], symmetric: bool, group_size: Any
) -> None:
    spec = make_spec(values, symmetric=symmetric, group_size=group_size)
    weight = gaussian(13, 48)
    whole = round_to_nearest(weight, spec)
    error = relative_error(weight, whole)
    monkeypatch.setattr(store, "_CHUNK_ELEMENTS", 100)
    chunked = round_to_nearest(weight, spec)
    assert all(torch.equal(tensor, chunked.tensors()[suffix]) for suffix, tensor in whole.tensors().items())
    assert relative_error(weight, chunked) == pytest.approx(error, rel=1e-6)


def test_relative_error_is_that_of_the_decoded_weight() -> None:
    for weight in (gaussian(8, 32), gaussian(2, 8, 32)):
        packed = round_to_nearest(weight, WeightSpec("int", 3))
        assert relative_error(weight, packed) == pytest.approx(
            ((weight - decode(packed)).norm() / weight.norm()).item(), rel=1e-5
        )
    assert relative_error(torch.zeros(2, 8), round_to_nearest(torch.zeros(2, 8), WeightSpec())) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_round_as_their_float32_values(dtype: torch.dtype) -> None:
    weight = gaussian(4, 32).to(dtype)
    assert torch.equal(
        round_to_nearest(weight, WeightSpec()).weight, round_to_nearest(weight.float(), WeightSpec()).weight
    )
