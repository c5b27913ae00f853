"""Simulated inputs are those that layers multiply, and gradients pass through them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels import quantize_tokens, restore_tokens
from hf_lowbit.training.straight_through import simulate_activation

SPECS = [
    ActivationSpec("int", 4),
    ActivationSpec("int", 4, False, 16),
    ActivationSpec("int", 4, group_size=16),
    ActivationSpec("int", 8, static=True),
    ActivationSpec("float8_e4m3fn", 8, static=True),
]


def inputs() -> Tensor:
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 48)
    return x.requires_grad_()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_values_are_those_of_the_codes(spec: ActivationSpec, known: bool) -> None:
    scale = torch.tensor([0.05]) if known and spec.static else None
    x = inputs()
    y = simulate_activation(x, spec, input_scale=scale)
    expected = restore_tokens(*quantize_tokens(x.detach().reshape(6, 48), spec, scale)).reshape(2, 3, 48)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.symmetric], ids=str)
def test_gradients_reach_what_each_scale_comes_from(spec: ActivationSpec) -> None:
    """With the largest input grows its group's error, in proportion: one more gradient for each scale, and no other."""
    x = inputs()
    y = simulate_activation(x, spec, through_scale=True)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (y * direction).sum().backward()
    assert x.grad is not None
    extra = x.grad - direction
    width = 48 if spec.group_size is None else spec.group_size
    parts = (1, -1) if spec.static else (-1, width)
    error, magnitude = ((y - x) * direction).detach().reshape(parts), x.detach().abs().reshape(parts)
    largest = magnitude.argmax(-1, keepdim=True)
    sign = x.detach().reshape(parts).gather(-1, largest).sign()
    expected = torch.zeros(magnitude.shape).scatter(
        -1, largest, sign * error.sum(-1, keepdim=True) / magnitude.amax(-1, keepdim=True)
    )
    torch.testing.assert_close(extra.reshape(parts), expected, rtol=1e-3, atol=1e-4)
