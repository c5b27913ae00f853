"""Blocks that compute in bfloat16 where their method asked for it, and float32 elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.calibration import autocast
from hf_lowbit.calibration.block import Block
from tests.plugins.outliers import outlier_llama, relative, walk


def seen(mixed_precision: bool) -> list[Tensor]:
    """What the second block reads, is to return and returns, and a statistic of what its layers read."""
    found: list[Tensor] = []

    def step(block: Block) -> None:
        if not block.name.endswith("1"):
            return
        flowing = block.flowing(0)
        assert flowing is not None
        hessian = block.hessians()["mlp.down_proj.weight"].matrix
        found.extend([flowing, block.target(0), block.run(0), hessian])

    walk(outlier_llama(), step, targets=True, mixed_precision=mixed_precision)
    return found


def test_everything_is_computed_a_little_less_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast, "has_bfloat16_units", lambda device: True)
    exact, mixed = seen(False), seen(True)
    assert len(exact) == 4
    for one, other in zip(exact, mixed, strict=True):
        assert other.dtype == torch.float32
        assert 0 < relative(other, one) < 2e-2


def test_nothing_changes_where_bfloat16_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast, "has_bfloat16_units", lambda device: False)
    pairs: Any = zip(seen(False), seen(True), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
