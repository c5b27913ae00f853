"""Products of inputs in small floating-point formats: exact values, float32 sums, scales outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, decode
from hf_lowbit.kernels import BACKENDS, packed_linear, why_not
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens
from hf_lowbit.rounding.floating_point import round_floating_point

every_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if why_not(name) is None])
FORMATS = [("fp_e4m3", 8), ("fp_e5m2", 8), ("ufp_e2m6", 8), ("fp_e2m3", 6), ("fp_e1m2", 4)]


def weight(group: Any = None, format: str = "fp", bits: int = 4) -> PackedTensor:
    torch.manual_seed(0)
    return round_floating_point(torch.randn(48, 130), WeightSpec(format, bits, group))


def inputs(tokens: int = 70) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(tokens, 130)


@every_backend
@pytest.mark.parametrize("group", ["tensor", None, 26])
@pytest.mark.parametrize("values", [{}, {"static": True}, {"static": True, "shift": True}, {"group_size": 65}])
@pytest.mark.parametrize(("format", "bits"), FORMATS)
def test_the_product_is_that_of_what_is_stored(
    backend: str, group: Any, values: dict[str, Any], format: str, bits: int
) -> None:
    packed, spec = weight(group), ActivationSpec(format, bits, **values)
    for tokens in (1, 70):
        x = inputs(tokens).abs() if format.startswith("u") else inputs(tokens)
        expected = restore_tokens(*quantize_tokens(x, spec)).double() @ decode(packed).double().t()
        found = packed_linear(x, packed, spec, backend)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("format", "bits"), FORMATS)
def test_what_multiplies_are_values_of_the_format(format: str, bits: int) -> None:
    spec = ActivationSpec(format, bits)
    codes, scale, _ = quantize_tokens(inputs(), spec)
    split = spec.floating_point
    assert split is not None and codes.dtype == torch.bfloat16
    assert torch.equal(split.round(codes.float()), codes.float()) and codes.max() == split.limit
    error = (restore_tokens(codes, scale) - (inputs().clamp(min=0) if not split.signed else inputs())).abs()
    assert error.max() <= 2.0 ** -(split.mantissa_bits + 1) * inputs().abs().max() + scale.max()


@every_backend
def test_sums_of_grid_values_are_exact(backend: str) -> None:
    """Scales of one and values of few bits: float32 holds every partial sum, and so every bit of the result."""
    spec = ActivationSpec("fp_e2m3", 6, static=True)
    packed = weight("tensor", "fp_e2m1")
    packed.scale = torch.ones(1, 1).bfloat16().view(torch.int16)
    one = torch.ones(1)
    x = inputs() * 3
    expected = quantize_tokens(x, spec, one).codes.double() @ decode(packed).double().t()
    found = packed_linear(x, packed, spec, backend, one)
    assert torch.equal(found.double(), expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend: str, dtype: torch.dtype) -> None:
    packed, spec, x = weight(), ActivationSpec("fp_e3m4", 8), inputs().to(dtype)
    expected = restore_tokens(*quantize_tokens(x, spec)) @ decode(packed).t()
    found = packed_linear(x, packed, spec, backend)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < 0.01


@every_backend
@pytest.mark.parametrize("values", [{}, {"static": True}])
def test_tokens_that_are_not_finite_stay_so(backend: str, values: dict[str, Any]) -> None:
    x = inputs(4)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    spec = ActivationSpec("fp_e4m3", 8, **values)
    found = packed_linear(x, weight(), spec, backend, torch.tensor([0.01]) if spec.static else None)
    assert found.isfinite().all(1).tolist() == [True, False, False, True]


def test_gradients_pass_straight_through() -> None:
    packed, x = weight(), inputs(5).requires_grad_()
    packed_linear(x, packed, ActivationSpec("fp_e2m1", 4)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, decode(packed).sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
