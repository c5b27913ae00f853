"""Recomputed activations: the same gradients, and less that is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_lowbit.calibration.trainable import in_float32, recomputing


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


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.inner = nn.Embedding(24, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.table.weight
        self.bfloat16()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        assert x.dtype == torch.float32
        return self.head(x + self.inner(self.norm(x)))


def test_tables_that_stay_multiply_as_autocast_would() -> None:
    model, ids = _Tied(), torch.arange(24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs, gradients = [], []
    for stay in (False, True):
        with in_float32(model, tables_stay=stay) as types, torch.autocast("cpu", torch.bfloat16):
            assert (model.head.weight.dtype == torch.bfloat16) == stay == (model.head.weight not in types)
            assert model.norm.weight.dtype == model.inner.bias.dtype == torch.float32
            outputs.append(model(ids))
            gradients.append(torch.autograd.grad(outputs[-1].float().square().sum(), model.norm.weight)[0])
    assert torch.equal(*outputs) and torch.equal(*gradients)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.table._forward_hooks
