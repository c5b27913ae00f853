"""Batches that the user made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hf_lowbit.calibration.data import DataError
from tests.calibration.data.helpers import IDS, no_tokenizer, prepare, rows
from tests.matrix.models import MODELS


def test_a_data_loader_gives_its_batches() -> None:
    """As they are, without labels, up to the number of samples."""
    samples = [{"input_ids": row, "attention_mask": torch.ones(20, dtype=torch.int32), "labels": row} for row in IDS]
    samples[0]["attention_mask"][:5] = 0
    result = prepare(DataLoader(samples, batch_size=3), None, no_tokenizer, num_samples=7)
    assert [list(batch) for batch in result.batches] == [["input_ids", "attention_mask"]] * 3
    assert rows(result) == IDS[:7].tolist()
    assert all(tensor.dtype == torch.int64 for batch in result.batches for tensor in batch.values())
    assert result.tokens == 7 * 20 - 5
    assert result.description == "batches of a DataLoader"


@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(TensorDataset(IDS), batch_size=5),
        lambda: [IDS[:5], IDS[5:]],
        lambda: ([ids] for ids in (IDS[:5], IDS[5:])),
        lambda: [{"input_ids": IDS[:5]}, {"input_ids": IDS[5:]}],
        lambda: iter([{"input_ids": IDS[:5]}, {"input_ids": IDS[5:]}]),
    ],
)
def test_tensors_alone_are_input_ids(data: Any) -> None:
    assert rows(prepare(data(), num_samples=10)) == IDS.tolist()


def test_no_more_is_read_than_is_needed() -> None:
    def endless() -> Iterator[dict[str, torch.Tensor]]:
        for start in range(2):
            yield {"input_ids": IDS[2 * start : 2 * start + 2]}
        raise AssertionError("read on")

    assert rows(prepare(endless())) == IDS[:4].tolist()


def test_other_inputs_of_other_models() -> None:
    """Features stay floating point; one dict is one batch."""
    batch = MODELS["whisper"].inputs(torch.float32)
    result = prepare(batch, MODELS["whisper"].build(), None, num_samples=1)
    assert result.batches[0]["input_features"].dtype == torch.float32
    assert result.tokens == 60
    sample = {"sample": torch.randn(3, 3, 16, 16), "timestep": torch.tensor([1, 2, 3])}
    assert prepare(sample, MODELS["unet"].build(), None, num_samples=2).tokens == 2


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (iter([]), "yields no batch"),
        ([{"input_ids": IDS[:3]}], "holds 3 samples; num_samples=4"),
        (iter(["a text"]), "batch 0 is a str"),
        ([{"labels": IDS}], "batch 0 holds no inputs"),
        ([{"input_ids": IDS[0]}], r"input_ids has the shape \[20\]"),
        ([{"input_ids": IDS, "attention_mask": IDS[:3]}], "differ in the first dimension"),
        ([{"input_ids": IDS.float()}], "input_ids is torch.float32"),
        ([{"input_ids": IDS.tolist()}], "input_ids is a list; it must be a tensor"),
        ([{"input_ids": IDS + 1}], "a tokenizer of another model"),
        ([{"input_ids": IDS - 1}], "not negative"),
        ([{"input_ids": torch.zeros(4, 3000, dtype=torch.int64)}], "the length is 3000, and the model has 2048"),
        ([{"input_ids": torch.zeros(0, 3, dtype=torch.int64)}], r"shape \[0, 3\]"),
    ],
)
def test_batches_that_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(batches)


def test_arguments_that_the_model_does_not_have() -> None:
    inputs = {"sample": torch.randn(4, 3, 16, 16), "timesteps": torch.zeros(4)}
    with pytest.raises(DataError, match="UNet2DModel takes no argument 'timesteps'"):
        prepare(inputs, MODELS["unet"].build())
