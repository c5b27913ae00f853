"""Recomputed activations: the same gradients, and less that is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_lowbit.calibration.trainable import recomputing


def _chain() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16)) for _ in range(6)]
    return nn.Sequential(*blocks)


def _gradients(chain: nn.Sequential, x: Tensor) -> tuple[list[Tensor], int]:
    """Of the parameters, and how many values the forward pass kept for them."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = chain(x).square().sum()
        forward = sum(kept)
    return list(torch.autograd.grad(output, list(chain.parameters()))), forward


def test_recomputing_keeps_what_flows_between_blocks_alone() -> None:
    chain = _chain()
    x = torch.randn(32, 16)
    expected, all_of_it = _gradients(chain, x)
    with recomputing(list(chain)):
        found, between = _gradients(chain, x)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert between < all_of_it / 10
    assert all("forward" not in vars(block) for block in chain)
