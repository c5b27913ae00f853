"""Codes of inputs, natively: those of torch to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, SpecError
from hf_lowbit.kernels import cpu, quantize_tokens


def difficult(dtype: torch.dtype) -> Tensor:
    """Tokens of zeros, with zeros in a group, tiny and huge ones, and such that are not finite."""
    x = torch.randn(9, 576, generator=torch.Generator().manual_seed(0)) * 3
    x[1], x[2, 5], x[3, 7], x[4, 570] = 0, float("nan"), float("inf"), -float("inf")
    x[5, :36], x[6] = 0, x[6] * 1e-3
    if dtype != torch.float16:
        x[7], x[8] = x[7] * 1e-42, x[8] * 1e37
    return x.to(dtype)


@pytest.mark.parametrize("dtype", cpu.FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 36])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_are_those_of_torch(bits: int, group_size: int | None, dtype: torch.dtype, instruction_set: str) -> None:
    x, activation = difficult(dtype), ActivationSpec("int", bits, group_size=group_size)
    expected = quantize_tokens(x, activation)
    assert cpu.quantizes(x, activation)
    for inputs in (x, x.repeat(1, 2)[:, :576], x.t().contiguous().t()):
        codes, scale = cpu.quantize_tokens(inputs, activation)
        assert torch.equal(codes, expected.codes)
        assert torch.equal(scale.view(torch.int32)[~scale.isnan()], expected.scale.view(torch.int32)[~scale.isnan()])
        assert torch.equal(scale.isnan(), expected.scale.isnan())


def test_no_tokens() -> None:
    codes, scale = cpu.quantize_tokens(torch.empty(0, 64), ActivationSpec("int", 8))
    assert codes.shape == (0, 64) and scale.shape == (0, 1)


def test_groups_must_divide() -> None:
    with pytest.raises(SpecError, match="do not divide 64 inputs"):
        cpu.quantize_tokens(torch.zeros(1, 64), ActivationSpec("int", 8, group_size=48))


@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec("int", 8, symmetric=False),
        ActivationSpec("int", 8, static=True),
        ActivationSpec("float8_e4m3fn", 8),
    ],
    ids=str,
)
def test_what_is_left_to_torch(activation: ActivationSpec) -> None:
    assert not cpu.quantizes(torch.zeros(1, 64), activation)
