"""Inputs whose codes have a shift, asymmetric ones of 8 bits or static: codes, and their products by every route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, decode
from hf_lowbit.kernels import cpu, kernel_of, packed_linear, packed_linears, quantize_tokens, restore_tokens, row_sums
from hf_lowbit.kernels.activation import integer_grid
from hf_lowbit.rounding import round_to_nearest

COLUMNS = 192
DYNAMIC = ActivationSpec("int", 8, symmetric=False)
STATIC = [ActivationSpec("int", bits, symmetric=False, static=True) for bits in (4, 6, 8)]
GROUPS = ActivationSpec("int", 8, symmetric=False, group_size=64, static=True)


def inputs(tokens: int = 6) -> Tensor:
    """As after SiLU: a long positive and a short negative side."""
    return torch.nn.functional.silu(3 * torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1)))


def weight(rows: int = 24, **values: Any) -> PackedTensor:
    generator = torch.Generator().manual_seed(0)
    return round_to_nearest(torch.randn(rows, COLUMNS, generator=generator), WeightSpec(**values))


def table(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    grouped = x.unflatten(-1, (spec.groups(x.shape[-1]), -1))
    return integer_grid(grouped.amin((0, 2)), grouped.amax((0, 2)), spec.bits)


@pytest.mark.parametrize("spec", STATIC, ids=str)
def test_codes_are_torchs(spec: ActivationSpec) -> None:
    """torch's and Q-Diffusion's definition, 2^b levels; the codes are these less 2^(b-1)."""
    x = inputs()
    scale, shift = table(x, spec)
    half = 2 ** (spec.bits - 1)
    zero = half - torch.round(shift / scale)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 2 * half - 1)
    quantized = quantize_tokens(x, spec, scale, shift)
    torch.testing.assert_close(restore_tokens(*quantized), expected, rtol=0, atol=1e-6)
    assert quantized.codes.dtype == torch.int8 and quantized.codes.min() == -half and quantized.codes.max() == half - 1


@pytest.mark.parametrize("spec", [DYNAMIC, *STATIC, GROUPS], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_exact(spec: ActivationSpec, sign: int) -> None:
    """Also where all inputs lie on one side of it: the range includes it."""
    x = sign * (inputs().abs() + 1)
    x[:, ::7] = 0
    stored = table(x, spec) if spec.static else ()
    assert (restore_tokens(*quantize_tokens(x, spec, *stored))[:, ::7] == 0).all()


def test_a_token_of_zeros_leaves_the_others_alone() -> None:
    """ViDiT-Q's pitfall: a guard that fills every scale where one is too small."""
    x = inputs()
    alone = quantize_tokens(x, DYNAMIC)
    x[2] = 0
    among = quantize_tokens(x, DYNAMIC)
    others = torch.tensor([0, 1, 3, 4, 5])
    for mine, theirs in zip(among, alone, strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine[others], theirs[others])
    assert not restore_tokens(*among)[2].any()


def test_of_inputs_on_one_side_it_has_twice_the_resolution() -> None:
    x = inputs()
    errors = [(restore_tokens(*quantize_tokens(x, spec)) - x).norm() for spec in (DYNAMIC, ActivationSpec("int", 8))]
    assert errors[0] < 0.6 * errors[1]


def test_static_groups_are_tensors_of_their_own() -> None:
    x = inputs() * torch.tensor([1.0, 50.0, 0.1]).repeat_interleave(64)
    scale, shift = table(x, GROUPS)
    together = quantize_tokens(x, GROUPS, scale, shift)
    assert together.scale.shape == (6, 3) and torch.equal(together.scale, scale.expand(6, 3))
    alone = [
        quantize_tokens(part, STATIC[2], scale[[index]], shift[[index]]).codes
        for index, part in enumerate(x.split(64, dim=1))
    ]
    assert torch.equal(together.codes, torch.cat(alone, dim=1))


def test_tokens_may_have_scales_of_their_own() -> None:
    x = inputs()
    scale, shift = table(x, STATIC[2])
    several = torch.stack([scale, 2 * scale, 3 * scale]).repeat_interleave(2, 0), shift.expand(6, 1)
    together = quantize_tokens(x, STATIC[2], *several)
    for token in range(6):
        alone = quantize_tokens(x[[token]], STATIC[2], several[0][token], several[1][token])
        assert torch.equal(together.codes[[token]], alone.codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", [DYNAMIC, STATIC[2], GROUPS], ids=str)
def test_what_is_not_finite_is_not_hidden(spec: ActivationSpec, value: float) -> None:
    x = inputs()
    stored = table(x, spec) if spec.static else ()
    x[3, 5] = value
    y = packed_linear(x, weight(bits=4), spec, None, *stored)
    assert not torch.isfinite(y[3]).any() and torch.isfinite(y[[0, 1, 2, 4, 5]]).all()


@pytest.mark.parametrize("spec", [DYNAMIC, *STATIC, GROUPS], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("tokens", [6, 300])
@pytest.mark.parametrize(
    "form",
    [{"bits": 4, "group_size": 64}, {"bits": 8, "group_size": None}, {"bits": 4, "symmetric": False}, {"format": "nf"}],
    ids=str,
)
def test_products(spec: ActivationSpec, backend: str | None, tokens: int, form: dict[str, Any]) -> None:
    """Those of the values that codes, scales and shifts stand for, by every route."""
    x, packed = inputs(tokens), weight(**form)
    stored = table(x, spec) if spec.static else (None, None)
    expected, of_half = (
        restore_tokens(*quantize_tokens(read, spec, *stored)).double() @ decode(packed).double().t()
        for read in (x, x.bfloat16())
    )
    sums = row_sums(packed, spec.groups(COLUMNS))
    for y in (
        packed_linear(x, packed, spec, backend, *stored),
        packed_linear(x, packed, spec, backend, *stored, sums),
        packed_linears(x, [packed, packed], spec, backend, *stored, [sums, sums])[1],
    ):
        assert (y.double() - expected).norm() < 2e-6 * expected.norm()
    low = packed_linear(x.bfloat16(), packed, spec, backend, *stored, sums)
    assert low.dtype == torch.bfloat16 and (low.double() - of_half).norm() < 0.003 * of_half.norm()


def test_sums_of_groups() -> None:
    packed = weight(bits=4, group_size=32)
    expected = decode(packed).double().unflatten(-1, (3, 64)).sum(-1)
    torch.testing.assert_close(row_sums(packed, 3).double(), expected, rtol=1e-6, atol=1e-6)
    assert row_sums(packed, 1).shape == (24, 1)


@pytest.mark.parametrize("name", cpu.instruction_sets())
def test_the_least_code_on_every_processor(name: str) -> None:
    """-128, whose sign AVX2 cannot change: it takes another way there."""
    x, packed = torch.full((3, COLUMNS), -1.0), weight(bits=4, group_size=64)
    x[:, 0] = 1e-6
    quantized = quantize_tokens(x, DYNAMIC)
    assert (quantized.codes[:, 1:] == -128).all()
    expected = restore_tokens(*quantized).double() @ decode(packed).double().t()
    try:
        cpu.use_instruction_set(name)
        assert kernel_of(packed, DYNAMIC, None) == ("torch" if name == "avx2" else "cpu")
        y = packed_linear(x, packed, DYNAMIC)
    finally:
        cpu.use_instruction_set(None)
    assert (y.double() - expected).norm() < 2e-6 * expected.norm()


def test_gradients_pass_straight_through() -> None:
    x, packed = inputs().requires_grad_(), weight(bits=4)
    packed_linear(x, packed, DYNAMIC).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, decode(packed).sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_compiled_it_is_the_same() -> None:
    x, packed = inputs(), weight(bits=4)
    scale, shift = table(x, STATIC[2])
    compiled = torch.compile(lambda x: packed_linear(x, packed, STATIC[2], None, scale, shift), backend="eager")
    assert torch.equal(compiled(x), packed_linear(x, packed, STATIC[2], None, scale, shift))
