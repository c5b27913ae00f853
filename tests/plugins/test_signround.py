"""SignRound: training a block lowers its error, for every start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.config import ConfigError
from tests.matrix.models import MODELS

LLAMA = MODELS["llama"]


def data() -> torch.Tensor:
    return torch.randint(0, 250, (16, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def error(**fields: Any) -> float:
    """Relative error of the logits on the calibration data: random weights teach nothing about other data."""
    torch.manual_seed(0)
    model = LLAMA.build().eval()
    expected = model(input_ids=data()).logits
    values = {"bits": 2, "group_size": 32, "iterations": 60, **fields}
    config = hf_lowbit.SignRoundConfig(**values, dataset=data(), num_samples=16, sequence_length=32)
    hf_lowbit.quantize(model, config)
    return float((model(input_ids=data()).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("start", ["nearest", "clip", "gptq"])
def test_training_lowers_the_error(start: str) -> None:
    assert error(start=start) < 0.95 * error(start=start, iterations=1)


@pytest.mark.parametrize("fields", [{"symmetric": False}, {"format": "nf"}, {"bits": 4, "format": "fp_e2m1"}], ids=str)
def test_every_kind_of_grid_is_trained(fields: dict[str, Any]) -> None:
    assert error(**fields) < 0.95 * error(**fields, iterations=1)


def test_the_seed_decides_the_bits() -> None:
    assert error(seed=1) == error(seed=1) != error(seed=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"reach": None}, "reach"),
        ({"optimizer": "sgd"}, "'sign', 'adam'"),
        ({"start": "random"}, "'gptq', 'clip', 'nearest'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_lowbit.SignRoundConfig(**fields)
