"""Calibration data as the engine takes it, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]  # tensors; a denoiser's may be nested

_SAMPLE_CHARACTERS = 200


class DataError(ValueError):
    """Calibration data that cannot be used; the message says what to change."""


@dataclass(frozen=True)
class CalibrationData:
    """Batches of model inputs, on the CPU, and what to say about them.

    Attributes:
        batches: keyword arguments of the model's forward, each tensor with a leading batch dimension. Ids are int64;
            features keep float32 (or the type they came in), so that whoever runs the model casts them to its type.
        description: where the data comes from, for logs and provenance.
        sample: the beginning of the first sample, decoded; None where no tokenizer was needed.
        fingerprint: sha256 over keys, types, shapes and bytes of all tensors, in their order.
        tokens: how many tokens, or frames of features where there are no token ids to read.
        facts: more to say about them in the config's provenance.
    """

    batches: Sequence[Batch]
    description: str
    sample: str | None
    fingerprint: str
    tokens: int
    facts: dict[str, Any] = field(default_factory=dict)


def to_result(batches: list[Batch], description: str, sample: str | None = None) -> CalibrationData:
    """The batches with their fingerprint and count; ``sample`` is cut to its first characters."""
    shown = None if sample is None else sample[:_SAMPLE_CHARACTERS]
    return CalibrationData(batches, description, shown, fingerprint(batches), sum(map(count_tokens, batches)))


def fingerprint(batches: Sequence[Batch]) -> str:
    """Sha256 (hexadecimal) over all keys and tensors, in their order and as they are batched."""
    digest = hashlib.sha256()
    for index, batch in enumerate(batches):
        for key, tensor in _flat(batch):
            digest.update(f"{index} {key!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flat(batch: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the names that lead to it."""
    for key, value in batch.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def count_tokens(batch: Batch) -> int:
    """Tokens that are no padding; frames of input features [batch, ..., frames]; else samples."""
    if "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        return int((mask != 0).sum()) if mask is not None and mask.shape == ids.shape else ids.numel()
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    features = next((batch[key] for key in ("input_features", "input_values") if key in batch), None)
    return int(first.shape[0]) if features is None else int(features.shape[0] * features.shape[-1])
