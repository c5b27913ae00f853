"""Products of codes: integers are exact, whatever the width; everything else decodes exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, unpack_codes
from hf_lowbit.formats.packed import scales, table_of, zero_points
from hf_lowbit.kernels import multiplies_integers, quantize_tokens, sliced, sliced_linear
from hf_lowbit.rounding import round_to_nearest

INT4, INT6, INT8 = (ActivationSpec("int", bits) for bits in (4, 6, 8))
FLOAT8 = ActivationSpec("float8_e4m3fn", 8)
PAIRS: dict[str, tuple[dict[str, Any], ActivationSpec]] = {
    "W8A8": ({"format": "int", "bits": 8}, INT8),
    "W4A8": ({"format": "int", "bits": 4}, INT8),
    "W4A4": ({"format": "int", "bits": 4}, INT4),
    "W4A6": ({"format": "int", "bits": 4}, INT6),
    "W1A8": ({"format": "int", "bits": 1}, INT8),
    "ternary-A8": ({"format": "ternary", "bits": 2, "packing": "base3"}, INT8),
    "E2M1-A8": ({"format": "fp_e2m1", "bits": 4}, INT8),
    "E2M3-A8": ({"format": "fp_e2m3", "bits": 6}, INT8),
    "W4A8-zero": ({"format": "int", "bits": 4, "symmetric": False}, INT8),
    "W4A8-real-zero": ({"format": "int", "bits": 4, "symmetric": False, "real_zero_point": True}, INT8),
    "W8A8-zero": ({"format": "int", "bits": 8, "symmetric": False}, INT8),
    "E2M1-A8-zero": ({"format": "fp_e2m1", "bits": 4, "symmetric": False}, INT8),
}
DECODED: dict[str, tuple[dict[str, Any], ActivationSpec]] = {
    "nf4-A8": ({"format": "nf", "bits": 4}, INT8),
    "power-A8": ({"format": "power", "bits": 4, "exponent": 0.7}, INT8),
    "codebook-A8": ({"format": "codebook", "bits": 3}, INT8),
    "fp8-fp8": ({"format": "float8_e4m3fn", "bits": 8}, FLOAT8),
    "e5m2-fp8": ({"format": "float8_e5m2", "bits": 8}, FLOAT8),
    "W4-fp8": ({"format": "int", "bits": 4}, FLOAT8),
    "nf4-A8-zero": ({"format": "nf", "bits": 4, "symmetric": False}, INT8),
}
every_group = pytest.mark.parametrize("group_size", [None, "tensor", 32])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_codes(codes: Tensor, scale: Tensor, packed: PackedTensor) -> Tensor:
    """The product in float64, straight from the codes and companions."""
    values = table_of(packed).double()[
        unpack_codes(packed.weight, packed.spec.bits, packed.columns, packed.spec.packing).int()
    ]
    weight_scale, zero = scales(packed).double(), zero_points(packed)
    groups = weight_scale.shape[-1]
    values = values.unflatten(-1, (groups, -1))
    if zero is not None:
        values = values - zero.double().unsqueeze(-1)
    weight = (values * weight_scale.unsqueeze(-1)).flatten(1)
    return codes.double() @ weight.t() * scale.double()


def product(
    weight: dict[str, Any], activation: ActivationSpec, group_size: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed = round_to_nearest(gaussian(24, 96), WeightSpec(**weight, group_size=group_size))
    codes, scale, _ = quantize_tokens(gaussian(5, 96, seed=1), activation)
    return sliced_linear(codes, scale, packed, dtype), from_codes(codes, scale, packed)


@pytest.fixture(params=["int8 dot", "float32 slices"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply int8, whatever this processor has."""
    monkeypatch.setattr(sliced, "has_int8_dot", lambda: request.param == "int8 dot")


@pytest.mark.usefixtures("arithmetic")
@settings(deadline=None, derandomize=True, max_examples=15)
@given(m=st.integers(1, 5), n=st.integers(1, 9), k=st.integers(1, 2500), seed=st.integers(0, 99))
def test_int8_product_is_exact(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    assert torch.equal(sliced.int8_product(a, b).long(), a.long() @ b.long().t())


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("k", [1, 1023, 1024, 1025, 2047, 5001])
@pytest.mark.parametrize("b_value", [-128, 127])
def test_int8_product_is_exact_at_the_extremes_and_equals_torch(k: int, b_value: int) -> None:
    """Odd sums beyond 2^24 are what float32 cannot hold; 127 * 127 makes them."""
    a, b = torch.full((17, k), 127, dtype=torch.int8), torch.full((8, k), b_value, dtype=torch.int8)
    result = sliced.int8_product(a, b)
    assert (result.long() == 127 * b_value * k).all()
    if k > 1:  # torch's own product of one column is wrong
        assert torch.equal(result.int(), torch._int_mm(a, b.t().contiguous()))


@pytest.mark.usefixtures("arithmetic")
@every_group
@pytest.mark.parametrize("pair", PAIRS)
def test_integer_products_are_those_of_the_codes(pair: str, group_size: Any) -> None:
    """Only float32 scaling rounds; the type of the model's activations plays no part."""
    weight, activation = PAIRS[pair]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result, exact = product(weight, activation, group_size, dtype)
        assert result.dtype == torch.float32
        assert torch.allclose(result.double(), exact, rtol=1e-6, atol=2e-6 * exact.abs().max().item())


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("pair", [name for name in PAIRS if "zero" not in name])
def test_integer_products_are_exact_when_scales_are_powers_of_two(pair: str) -> None:
    """With nothing left to round, the result is the float64 one bit for bit."""
    weight, activation = PAIRS[pair]
    packed = round_to_nearest(gaussian(24, 96), WeightSpec(**weight))
    packed.scale = torch.full((24, 1), 0.25).bfloat16().view(torch.int16)
    codes, *_ = quantize_tokens(gaussian(5, 96, seed=1), activation)
    half = torch.full((5, 1), 0.5)
    assert torch.equal(sliced_linear(codes, half, packed, torch.bfloat16).double(), from_codes(codes, half, packed))


@pytest.mark.parametrize("pair", PAIRS)
def test_integer_pairs_are_reported_as_integers(pair: str) -> None:
    weight, activation = PAIRS[pair]
    assert multiplies_integers(WeightSpec(**weight), activation)


@every_group
@pytest.mark.parametrize("pair", DECODED)
def test_other_pairs_decode_exactly(pair: str, group_size: Any) -> None:
    weight, activation = DECODED[pair]
    assert not multiplies_integers(WeightSpec(**weight), activation)
    result, exact = product(weight, activation, group_size, torch.float32)
    assert torch.allclose(result.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("pair", DECODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_values_survive_narrow_types(pair: str, dtype: torch.dtype) -> None:
    """Tables that the type cannot hold multiply in float32; the others lose no more than the type's own rounding."""
    weight, activation = DECODED[pair]
    result, exact = product(weight, activation, None, dtype)
    exact_in_bfloat16 = weight["format"] in ("int", "float8_e4m3fn", "float8_e5m2") and dtype == torch.bfloat16
    tolerance = 2.0**-8 if exact_in_bfloat16 else 1e-5
    assert torch.allclose(result.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item() / 10)


def test_a_whole_row_longer_than_a_slice() -> None:
    packed = round_to_nearest(gaussian(8, 3000), WeightSpec("int", 8))
    codes, scale, _ = quantize_tokens(gaussian(3, 3000, seed=1), INT8)
    exact = from_codes(codes, scale, packed)
    result = sliced_linear(codes, scale, packed, torch.float32)
    assert torch.allclose(result.double(), exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
