"""Learned step sizes: what they compute, and the published gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import integer_grid, quantize_tokens, restore_tokens
from hf_lowbit.training.step_size import quantize_with_steps


def grids(x: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and shift ``[groups]`` that clip a part of the values."""
    grouped = 0.6 * x.unflatten(-1, (groups, -1))
    return integer_grid(grouped.amin((0, 2)), grouped.amax((0, 2)), bits)


def limits(scale: Tensor, shift: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    zero = (shift / scale).round()
    return zero - 2 ** (bits - 1), zero + 2 ** (bits - 1) - 1


def test_the_values_are_those_of_the_kernels() -> None:
    x = torch.randn(50, 24) + 0.7
    for bits, groups in ((4, 3), (8, 1)):
        scale, shift = grids(x, groups, bits)
        spec = ActivationSpec("int", bits, symmetric=False, group_size=24 // groups, static=True)
        expected = restore_tokens(*quantize_tokens(x, spec, scale, shift))
        assert torch.allclose(quantize_with_steps(x, scale, *limits(scale, shift, bits)), expected, atol=1e-6)


def test_gradients_are_those_of_plain_autograd() -> None:
    """Of step * clamp(round(x / step)), rounding passed straight through."""
    x, outer = torch.randn(2, 25, 24) + 0.7, torch.randn(2, 25, 24)
    scale, shift = grids(x.flatten(0, 1), 3, 4)
    first, last = limits(scale, shift, 4)
    mine, steps = x.clone().requires_grad_(), scale.clone().requires_grad_()
    (quantize_with_steps(mine, steps, first, last) * outer).sum().backward()

    plain, plain_steps = x.clone().requires_grad_(), scale.clone().requires_grad_()
    units = plain.unflatten(-1, (3, -1)) / plain_steps[:, None]
    level = (units.round() - units).detach() + units
    ends = torch.minimum(torch.maximum(units.round(), first[:, None]), last[:, None]).detach()
    level = torch.where(units.round() == ends, level, ends)
    ((level * plain_steps[:, None]).flatten(-2) * outer).sum().backward()
    assert mine.grad is not None and steps.grad is not None
    assert torch.allclose(mine.grad, plain.grad) and (mine.grad == 0).any()
    assert torch.allclose(steps.grad, plain_steps.grad, rtol=1e-4, atol=1e-4)


def test_a_step_learns_to_fit_its_inputs() -> None:
    x = torch.randn(400, 16)
    scale, shift = grids(10 * x, 1, 4)  # ten times too wide
    steps = torch.nn.Parameter(scale.clone())
    first, last = limits(scale, shift, 4)
    optimizer = torch.optim.Adam([steps], lr=0.05)
    errors = []
    for _ in range(100):
        loss = (quantize_with_steps(x, steps, first, last) - x).square().mean()
        errors.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < 0.2 * errors[0]
