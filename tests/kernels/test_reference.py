"""The reference product: decode exactly, multiply with torch, and keep no dense weight for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, decode
from hf_lowbit.kernels import packed_linear, quantize_tokens
from hf_lowbit.rounding import round_to_nearest

FORMATS: list[dict[str, Any]] = [
    *[{"format": "int", "bits": bits} for bits in range(1, 9)],
    {"format": "int", "bits": 4, "symmetric": False, "group_size": 16},
    {"format": "int", "bits": 4, "symmetric": False, "group_size": 16, "real_zero_point": True},
    {"format": "nf", "bits": 4, "group_size": "tensor"},
    {"format": "nf", "bits": 3, "symmetric": False},
    {"format": "ternary", "bits": 2, "packing": "base3"},
    {"format": "float8_e5m2", "bits": 8},
    {"format": "codebook", "bits": 3, "group_size": 16},
]
every_format = pytest.mark.parametrize("values", FORMATS, ids=lambda v: "-".join(map(str, v.values())))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(**values: Any) -> PackedTensor:
    return round_to_nearest(gaussian(24, 48), WeightSpec(**values))


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_product_with_decoded_weights(values: dict[str, Any], dtype: torch.dtype) -> None:
    packed, x = packed_weight(**values), gaussian(2, 5, 48, seed=1).to(dtype)
    y = packed_linear(x, packed, backend="reference")
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, decode(packed, dtype)))


@every_format
def test_gradient_to_the_input_is_the_dense_one(values: dict[str, Any]) -> None:
    packed = packed_weight(**values)
    x, y = (gaussian(5, 48, seed=1).requires_grad_() for _ in range(2))
    upstream = gaussian(5, 24, seed=2)
    packed_linear(x, packed).backward(upstream)
    F.linear(y, decode(packed)).backward(upstream)
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad, atol=1e-5)


def test_gradient_passes_the_activation_rounding_straight_through() -> None:
    packed = packed_weight()
    x = gaussian(5, 48, seed=1).requires_grad_()
    upstream = gaussian(5, 24, seed=2)
    packed_linear(x, packed, ActivationSpec("int", 8)).backward(upstream)
    assert x.grad is not None
    assert torch.allclose(x.grad, upstream @ decode(packed), atol=1e-5)


@pytest.mark.parametrize("activation", [None, ActivationSpec("int", 8), ActivationSpec("float8_e4m3fn", 8)])
def test_the_graph_keeps_no_dense_weight(activation: ActivationSpec | None) -> None:
    packed, kept = packed_weight(), []
    x = gaussian(5, 48, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = packed_linear(x, packed, activation)
    context = vars(y.grad_fn)
    assert not kept
    assert not any(isinstance(value, Tensor) and value.is_floating_point() for value in context.values())
    assert context["packed"] is packed


@pytest.mark.parametrize("activation", [None, ActivationSpec("int", 8), ActivationSpec("float8_e4m3fn", 8)])
@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48)])
def test_no_tokens_give_no_outputs(activation: ActivationSpec | None, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = packed_linear(x, packed_weight(), activation)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 24)


def test_one_token_without_leading_dimensions() -> None:
    x, packed = gaussian(48, seed=1), packed_weight()
    for activation in (None, ActivationSpec()):
        assert torch.allclose(
            packed_linear(x, packed, activation), packed_linear(x[None], packed, activation)[0], atol=1e-5
        )


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_tokens_are_rounded_to_their_own_symmetric_grid(bits: int) -> None:
    x = gaussian(7, 48) * torch.logspace(-3, 3, 7).unsqueeze(1)
    codes, scale, _ = quantize_tokens(x, ActivationSpec("int", bits))
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and scale.shape == (7, 1)
    assert (codes.abs().amax(1) == limit).all()
    assert ((x - codes * scale).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("shift", [0.0, 1.5, 9.0, -9.0])
def test_tokens_are_rounded_to_their_own_range_with_zero(bits: int, shift: float) -> None:
    """Values far on one side of zero: half of a symmetric grid would lie idle."""
    x = (gaussian(7, 48) + shift) * torch.logspace(-3, 3, 7).unsqueeze(1)
    codes, scale, _ = quantize_tokens(x, ActivationSpec("int", bits, symmetric=False))
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    assert codes.dtype == torch.int8
    torch.testing.assert_close(scale[:, 0], (high - low) / (2**bits - 1))
    assert (codes.amax(1).int() - codes.amin(1).int().clamp(max=0) <= 2**bits - 1).all()
    assert ((x - codes * scale).abs() <= scale * 1.0001).all()  # the zero point is rounded: one end may saturate
    inside = (codes > codes.amin(1, keepdim=True)) & (codes < codes.amax(1, keepdim=True))
    assert ((x - codes * scale).abs() <= scale * 0.5001)[inside].all()
    symmetric, wide, _ = quantize_tokens(x, ActivationSpec("int", bits))
    if shift:
        assert (x - codes * scale).norm() < 0.75 * (x - symmetric * wide).norm()


def test_asymmetric_codes_are_those_of_the_textbook() -> None:
    """QUIK, test 5: s_x s_w (q - z) w is the product of the dequantized token, z s_x s_w sum(w) with it."""
    x, packed = gaussian(5, 48, seed=3) + 0.7, packed_weight(bits=4)
    codes, scale, _ = quantize_tokens(x, ActivationSpec("int", 4, symmetric=False))
    low = x.amin(1, keepdim=True).clamp(max=0)
    zero = (-low / scale).round()
    q = ((x / scale).round() + zero).clamp(0, 15)
    assert torch.equal(codes.float(), q - zero)
    w = decode(packed)
    expected = scale * (q @ w.t()) - scale * zero * w.sum(1)
    for backend in (None, "reference"):
        y = packed_linear(x, packed, ActivationSpec("int", 4, symmetric=False), backend)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_float8_tokens_use_the_whole_range() -> None:
    x = gaussian(7, 48) * torch.logspace(-3, 3, 7).unsqueeze(1)
    codes, scale, _ = quantize_tokens(x, ActivationSpec("float8_e4m3fn", 8))
    assert codes.dtype == torch.float8_e4m3fn
    assert (codes.float().abs().amax(1) == 448).all()
    assert ((x - codes.float() * scale).abs() <= x.abs() / 16 + scale * 2.0**-10).all()


def test_zero_and_subnormal_tokens_are_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-45, -1e-45]])
    for activation in (ActivationSpec(), ActivationSpec("float8_e4m3fn", 8), ActivationSpec("int", 4, False)):
        codes, scale, _ = quantize_tokens(x, activation)
        assert torch.isfinite(scale).all() and (codes.float() * scale == 0).all()


@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec("int", 4),
        ActivationSpec("int", 4, False),
        ActivationSpec("int", 8),
        ActivationSpec("float8_e4m3fn", 8),
    ],
)
@pytest.mark.parametrize("weight", [{"format": "int"}, {"format": "nf", "symmetric": False}], ids=["int", "nf"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_spoils_itself_and_no_other(activation: ActivationSpec, weight: dict[str, Any], bad: float) -> None:
    x = gaussian(4, 48, seed=1)
    clean = packed_linear(x, packed_weight(**weight), activation)
    x[2, 5] = bad
    y = packed_linear(x, packed_weight(**weight), activation)
    assert not torch.isfinite(y[2]).any()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_out_of_range_results_of_float16_are_infinite_not_wrong() -> None:
    packed = round_to_nearest(gaussian(4, 48) * 100, WeightSpec())
    y = packed_linear(torch.full((1, 48), 6e4, dtype=torch.float16), packed, ActivationSpec())
    exact = F.linear(torch.full((1, 48), 6e4), decode(packed))
    assert torch.equal(torch.isfinite(y), exact.abs() < 65520)
