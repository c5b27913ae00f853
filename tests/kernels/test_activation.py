"""Inputs quantized in groups, or with a stored scale: codes, and products of them by every route."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, SpecError, WeightSpec, decode
from hf_lowbit.formats.packed import scales, zero_points
from hf_lowbit.kernels import (
    arithmetic,
    kernel_of,
    packed_linear,
    packed_linears,
    products,
    quantize_tokens,
    restore_tokens,
    sliced,
)
from hf_lowbit.rounding import round_to_nearest

STATIC = ActivationSpec("int", 8, static=True)
FLOAT8 = ActivationSpec("float8_e4m3fn", 8, static=True)
COLUMNS = 192


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> Tensor:
    """Groups of very different size."""
    return gaussian(6, COLUMNS, seed=1) * torch.logspace(-2, 2, COLUMNS)


def packed_weight(rows: int = 24, **values: Any) -> PackedTensor:
    return round_to_nearest(gaussian(rows, COLUMNS), WeightSpec(**values))


def exact(x: Tensor, packed: PackedTensor, spec: ActivationSpec, input_scale: Tensor | None = None) -> Tensor:
    """In float64, of the values that codes and scales stand for."""
    values = restore_tokens(*quantize_tokens(x, spec, input_scale))
    return values.double() @ decode(packed).double().t()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_each_group_has_a_grid_of_its_own(bits: int) -> None:
    spec = ActivationSpec("int", bits, group_size=64)
    codes, scale, _ = quantize_tokens(inputs(), spec)
    assert codes.dtype == torch.int8 and codes.shape == (6, COLUMNS) and scale.shape == (6, 3)
    assert (codes.unflatten(-1, (3, 64)).abs().amax(-1) == spec.limit).all()
    for group in range(3):  # as if each were a tensor alone
        own = slice(64 * group, 64 * (group + 1))
        alone, its_scale, _ = quantize_tokens(inputs()[:, own], ActivationSpec("int", bits))
        assert torch.equal(codes[:, own], alone) and torch.equal(scale[:, [group]], its_scale)
    error = (restore_tokens(codes, scale) - inputs()).norm()
    assert error < (restore_tokens(*quantize_tokens(inputs(), ActivationSpec("int", bits))) - inputs()).norm()


def test_inputs_that_are_never_negative_have_all_codes() -> None:
    """What SVDQuant's unsigned codes are for: an asymmetric group of such inputs has its zero point at zero."""
    spec = ActivationSpec("int", 4, False, 64)
    codes, scale, _ = quantize_tokens(inputs().abs(), spec)
    assert codes.min() == 0 and (codes.unflatten(-1, (3, 64)).amax(-1) == 15).all()
    torch.testing.assert_close(scale, inputs().abs().unflatten(-1, (3, 64)).amax(-1) / 15)


def test_groups_must_divide() -> None:
    with pytest.raises(SpecError, match="groups of 65"):
        quantize_tokens(inputs(), ActivationSpec("int", 4, group_size=65))


def test_static_codes_are_clipped_to_the_stored_range() -> None:
    """Beyond 127 steps lies the last code, not an overflow; inside, half a step is all that is lost."""
    scale = torch.tensor([0.01])
    x = torch.tensor([[0.0, 0.004, 0.006, -1.27, 1.3, -500.0]])
    codes, used, _ = quantize_tokens(x, STATIC, scale)
    assert codes.tolist() == [[0, 0, 1, -127, 127, -127]]
    assert torch.equal(used, scale.reshape(1, 1))
    eighth, *_ = quantize_tokens(x * 1000, FLOAT8, scale)
    assert eighth.float()[0, 4:].tolist() == [448.0, -448.0]


def test_a_scale_that_is_not_known_yet_is_that_of_the_whole_input() -> None:
    codes, scale, _ = quantize_tokens(inputs(), STATIC)
    assert torch.equal(scale, (inputs().abs().max() / 127).expand(6, 1))
    assert codes.abs().max() == 127
    assert quantize_tokens(inputs()[:0], STATIC)[1].shape == (0, 1)
    assert not quantize_tokens(0 * inputs(), STATIC)[0].any()


WEIGHTS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4},
    "int4-64": {"bits": 4, "group_size": 64},
    "int4-96": {"bits": 4, "group_size": 96},
    "int4-32-zero": {"bits": 4, "group_size": 32, "symmetric": False},
    "int8-tensor": {"bits": 8, "group_size": "tensor"},
    "nf4-64": {"format": "nf", "bits": 4, "group_size": 64},
}
ACTIVATIONS = [
    ActivationSpec("int", 4, group_size=64),
    ActivationSpec("int", 4, False, 32),
    ActivationSpec("int", 8, group_size=96),
    ActivationSpec("float8_e4m3fn", 8, group_size=64),
    STATIC,
    ActivationSpec("int", 4, static=True),
    FLOAT8,
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_products_are_those_of_the_codes(
    weight: dict[str, Any], activation: ActivationSpec, backend: str | None
) -> None:
    packed, scale = packed_weight(**weight), torch.tensor([0.3]) if activation.static else None
    expected = exact(inputs(), packed, activation, scale)
    for tokens in (1, 6):
        y = packed_linear(inputs()[:tokens], packed, activation, backend, scale)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected[:tokens], rtol=2e-6, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("group", [32, 64, 96])
def test_sums_within_a_group_are_exact_integers(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many integer products as there are runs of one weight scale and one input scale; nothing else multiplies."""
    made: list[tuple[torch.dtype, int]] = []
    real = sliced.int8_product

    def counted(a: Tensor, b: Tensor) -> Tensor:
        made.append((a.dtype, a.shape[1]))
        result = real(a, b)
        assert torch.equal(result.long(), a.long() @ b.long().t())
        return result

    monkeypatch.setattr(sliced, "int8_product", counted)
    packed, activation = packed_weight(bits=4, group_size=64), ActivationSpec("int", 4, group_size=group)
    packed_linear(inputs(), packed, activation, "reference")
    width = math.gcd(group, 64)
    assert made == [(torch.int8, width)] * (COLUMNS // width)
    assert arithmetic(packed.spec, activation) == "int8"


def test_groups_with_little_in_common_are_simulated_and_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 48 and 64 share runs of 16 inputs; those of 24 and 64 runs of 8, which are not worth a product each."""
    packed = packed_weight(bits=4, group_size=64)
    assert arithmetic(packed.spec, ActivationSpec("int", 8, group_size=48)) == "int8"
    assert arithmetic(packed_weight(format="nf", bits=4).spec, ActivationSpec("int", 8, group_size=48)) == (
        "float (decoded)"
    )
    rare = ActivationSpec("int", 8, group_size=24)
    assert arithmetic(packed.spec, rare) == "simulated"
    for narrow in (packed_weight(bits=4), packed_weight(bits=4, group_size=8)):  # asked for, and nothing is cut
        assert arithmetic(narrow.spec, ActivationSpec("int", 8, group_size=8)) == "int8"
    monkeypatch.setattr(sliced, "int8_product", None)
    for backend in (None, "reference"):
        y = packed_linear(inputs(), packed, rare, backend)
        torch.testing.assert_close(y.double(), exact(inputs(), packed, rare), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "fields", [{"format": "nf", "bits": 4}, {"format": "nf", "bits": 3}, {"format": "float8_e4m3fn", "bits": 8}]
)
@pytest.mark.parametrize("spec", [ActivationSpec("int", 8), ActivationSpec("int", 8, group_size=32)], ids=str)
def test_codes_that_meet_no_integers_are_not_unpacked(
    fields: dict[str, Any], spec: ActivationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_weight(group_size=64, **fields)
    monkeypatch.setattr(products, "sliced_linear", None)
    y = packed_linear(inputs(), packed, spec)
    torch.testing.assert_close(y.double(), exact(inputs(), packed, spec), rtol=1e-5, atol=1e-4)


def test_what_runs_is_named() -> None:
    packed = packed_weight(bits=4, group_size=64)
    assert kernel_of(packed, STATIC, None) == kernel_of(packed, ActivationSpec(), None)
    assert kernel_of(packed, STATIC, "reference") == "torch"
    same, other = (ActivationSpec("int", 4, group_size=size) for size in (64, 32))
    assert kernel_of(packed, same, None) == kernel_of(packed, ActivationSpec(), None)
    assert kernel_of(packed, other, None) == "torch"
    assert kernel_of(packed_weight(format="nf", bits=4), other, None) == "cpu"
    for fields in ({"bits": 3}, {"bits": 6}, {"format": "ternary", "bits": 2, "packing": "base3"}):
        assert kernel_of(packed_weight(**fields), ActivationSpec(), None) == "cpu"


@pytest.mark.parametrize("activation", [ActivationSpec("int", 4, group_size=64), STATIC], ids=str)
def test_products_at_once_are_those_one_by_one(activation: ActivationSpec) -> None:
    scale = torch.tensor([0.3]) if activation.static else None
    weights = [packed_weight(bits=4, group_size=64), packed_weight(rows=8, bits=8), packed_weight(format="nf", bits=4)]
    together = packed_linears(inputs(), weights, activation, None, scale)
    for packed, y in zip(weights, together, strict=True):
        assert torch.equal(y, packed_linear(inputs(), packed, activation, None, scale))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_spoils_itself_and_no_other(activation: ActivationSpec, bad: float) -> None:
    packed, scale = packed_weight(bits=4, group_size=32), torch.tensor([0.3]) if activation.static else None
    x, clean = inputs(), packed_linear(inputs(), packed, activation, None, scale)
    x[2, 5] = bad
    y = packed_linear(x, packed, activation, None, scale)
    assert not torch.isfinite(y[2]).any()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("activation", [ActivationSpec("int", 4, group_size=64), STATIC], ids=str)
def test_gradients_and_tracing(activation: ActivationSpec) -> None:
    """Rounding and clipping pass gradients straight through; a traced product is the eager one."""
    packed, scale = packed_weight(bits=4, group_size=64), torch.tensor([0.3]) if activation.static else None
    x = inputs().requires_grad_()
    upstream = gaussian(6, 24, seed=2)
    expected = packed_linear(x, packed, activation, None, scale)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ decode(packed))

    def traced(x: Tensor) -> Tensor:
        return packed_linear(x, packed, activation, None, scale)

    again = inputs().requires_grad_()
    y = torch.compile(traced, fullgraph=True, backend="aot_eager")(again)
    y.backward(upstream)
    assert torch.equal(y, expected) and torch.equal(again.grad, x.grad)  # type: ignore[arg-type]


def test_slices_read_the_zero_points_and_scales_of_their_own_groups() -> None:
    """A weight group of 64 holds two activation groups of 32, and one of 96 lies across two weight groups."""
    packed = packed_weight(bits=4, group_size=64, symmetric=False)
    zero = zero_points(packed)
    assert zero is not None and scales(packed).shape == (24, 3) == tuple(zero.shape)
    for group in (32, 96):
        activation = ActivationSpec("int", 8, group_size=group)
        expected = exact(inputs(), packed, activation)
        y = packed_linear(inputs(), packed, activation, "reference").double()
        torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())
