"""What is asked of the data, and how its samples are chosen and put into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.calibration.data.result import Batch, DataError


@dataclass(frozen=True)
class Request:
    """The arguments of `prepare_data`, without the data.

    Raises:
        DataError: a number that is too small.
    """

    model: Any
    tokenizer_source: Callable[[], Any] | None
    num_samples: int
    sequence_length: int
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("sequence_length", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise DataError(f"{name} is {value!r}; it must be an integer of at least {least}")

    def choose(self, available: int, unit: str, remedy: str = "give more, or lower num_samples") -> list[int]:
        """Indices of ``num_samples`` of the samples, ascending: drawn by the seed, without replacement.

        Raises:
            DataError: there are fewer.
        """
        if available < self.num_samples:
            raise DataError(f"the data holds {available} {unit}; num_samples={self.num_samples}: {remedy}")
        order = torch.randperm(available, generator=self.generator())
        return sorted(order[: self.num_samples].tolist())

    def generator(self) -> torch.Generator:
        """A new random generator on the CPU, at the seed."""
        return torch.Generator().manual_seed(self.seed)


def batch_rows(rows: Sequence[Tensor], batch_size: int) -> list[Batch]:
    """Token rows (int64 [n], any lengths) as batches of rows of equal length, shorter rows first, without padding."""
    batches: list[list[Tensor]] = []
    for row in sorted(rows, key=len):  # stable: rows of equal length keep their order
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [{"input_ids": torch.stack(batch)} for batch in batches]
