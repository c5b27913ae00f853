"""Calibration data of diffusion models by timestep: which samples of which batch, read when they are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_lowbit.calibration.predictions import samples_of
from hf_lowbit.calibration.units import Batch

_HELD_OUT = 4  # one sample of so many


@dataclass(frozen=True)
class Part:
    """Some samples of one batch.

    Attributes:
        batches: which may lie on disk.
        index: of the batch.
        rows: of its samples.
    """

    batches: Sequence[Batch]
    index: int
    rows: tuple[int, ...]

    def load(self) -> Batch:
        """The model's arguments for these samples. Tensors that are not of as many samples belong to all of them."""
        batch = self.batches[self.index]
        size = samples_of(batch)
        if self.rows == tuple(range(size)):
            return batch

        def own(value: Any) -> Any:
            is_of_samples = isinstance(value, Tensor) and value.dim() and len(value) == size
            return value[list(self.rows)] if is_of_samples else value

        cut: Batch = tree_map(own, dict(batch))
        return cut

    def pieces(self, samples: int) -> list[Part]:
        """Of at most so many samples."""
        return [replace(self, rows=self.rows[i : i + samples]) for i in range(0, len(self.rows), samples)]


def timesteps_of(batch: Batch) -> Tensor | None:
    """float64 ``[samples]``; None where the batch has no "timestep"."""
    given = batch.get("timestep")
    if given is None:
        return None
    return torch.as_tensor(given).detach().double().reshape(-1).cpu().expand(samples_of(batch))


def by_timestep(batches: Sequence[Batch]) -> dict[float | None, list[Part]]:
    """Timestep, the largest first -> the samples of each batch that have it; None -> those of batches without."""
    found: dict[float | None, list[Part]] = {}
    for index in range(len(batches)):
        batch = batches[index]
        times, size = timesteps_of(batch), samples_of(batch)
        each = [None] * size if times is None else times.tolist()
        for time in dict.fromkeys(each):
            rows = tuple(row for row in range(size) if each[row] == time)
            found.setdefault(time, []).append(Part(batches, index, rows))
    return dict(sorted(found.items(), key=lambda item: -1.0 if item[0] is None else item[0], reverse=True))


def held_out(parts: Iterable[Part], samples: int) -> tuple[list[Part], list[Part]]:
    """The samples of one timestep in pieces of at most ``samples``: those to train on, and those to judge by.

    The last quarter of them, at least one, is held out; a single sample is not.
    """
    own = list(parts)
    total = sum(len(part.rows) for part in own)
    left = total - max(1, total // _HELD_OUT) if total > 1 else 1
    trained, judged = [], []
    for part in own:
        trained.append(replace(part, rows=part.rows[:left]))
        judged.append(replace(part, rows=part.rows[left:]))
        left = max(0, left - len(part.rows))
    return [p for part in trained for p in part.pieces(samples)], [p for part in judged for p in part.pieces(samples)]
