"""What the tests of learned rounding share: specs to go through, and the smallest of trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.learned import LearnedWeight

FORMATS: list[dict[str, Any]] = [
    *[{"format": "int", "bits": bits} for bits in (1, 2, 3, 4, 8)],
    {"format": "nf", "bits": 4},
    {"format": "fp_e2m1", "bits": 4},
    {"format": "float8_e4m3fn", "bits": 8},
    {"format": "power", "bits": 4, "exponent": 0.5},
    {"format": "ternary", "bits": 2},
    {"format": "codebook", "bits": 3},
]
SPECS = [
    WeightSpec(**values, group_size=group_size, symmetric=symmetric)
    for values in FORMATS
    for symmetric in (True, False)
    for group_size in (None, 16, "tensor")
    if symmetric or values["format"] != "ternary"
] + [WeightSpec("int", 4, group_size, symmetric=False, real_zero_point=True) for group_size in (None, 16, "tensor")]
INTEGERS = [
    WeightSpec("int", bits, group_size, symmetric)
    for bits in (2, 3, 4)
    for group_size in (None, 16)
    for symmetric in (True, False)
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.json)
every_integer = pytest.mark.parametrize("spec", INTEGERS, ids=lambda spec: spec.json)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns, packed.spec.packing).int()


def correlated_inputs(tokens: int, columns: int, seed: int) -> Tensor:
    """Few strong directions, the same for every seed of tokens, as activations have them."""
    mixing = gaussian(columns, columns, seed=99) * torch.arange(1, columns + 1).pow(-0.7).unsqueeze(1)
    return gaussian(tokens, columns, seed=seed) @ mixing / mixing.square().sum(0).mean().sqrt()


def layer_weight() -> Tensor:
    """A small linear layer whose outputs are of the size of its inputs."""
    return gaussian(16, 64) / 8


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    return (inputs @ (weight - other).T).square().sum(1).mean().item()


def train(
    learned: LearnedWeight,
    weight: Tensor,
    inputs: Tensor,
    steps: int,
    rate: float,
    optimizer: str = "adam",
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """The reconstruction of one linear layer; returns the losses. "sign" falls linearly, as SignRound's does."""
    groups = [{"params": g["params"], "lr": rate * g["lr_scale"]} for g in learned.parameter_groups()]
    adam = torch.optim.Adam(groups)
    target, losses = inputs @ weight.T, []
    for step in range(steps):
        progress = step / steps
        learned.anneal_(progress)
        loss = (inputs @ learned().T - target).square().sum(1).mean()
        adam.zero_grad()
        (loss + learned.regularizer(progress)).backward()
        if optimizer == "adam":
            adam.step()
        else:
            with torch.no_grad():
                for group in groups:
                    for parameter in group["params"]:
                        parameter -= group["lr"] * (1 - progress) * parameter.grad.sign()
        learned.constrain_()
        if after is not None:
            after(step)
        losses.append(loss.item())
    return losses


def errors_on_held_out(learned: LearnedWeight, weight: Tensor, spec: WeightSpec) -> tuple[float, float]:
    """Output error after training and that of round to nearest, on inputs that were not trained on."""
    inputs = correlated_inputs(1024, weight.shape[1], seed=7)
    nearest = decode(round_to_nearest(weight, spec))
    return output_error(weight, decode(learned.pack()), inputs), output_error(weight, nearest, inputs)
