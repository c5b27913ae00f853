"""One entrance for every kind of calibration data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowbit.calibration.data.audio import from_recordings
from hf_lowbit.calibration.data.datasets import from_dataset, from_name, is_dataset_name
from hf_lowbit.calibration.data.files import TEXT_SUFFIXES, read_texts
from hf_lowbit.calibration.data.generated import from_model
from hf_lowbit.calibration.data.ready import from_batches
from hf_lowbit.calibration.data.recorded import RecordedBatches
from hf_lowbit.calibration.data.request import Request
from hf_lowbit.calibration.data.result import CalibrationData, DataError
from hf_lowbit.calibration.data.text import check_texts, from_texts
from hf_lowbit.calibration.data.tokens import from_ids, from_rows

_KINDS = (
    "calibration data is one of: a file (.txt, .json, .jsonl); a dataset, 'name[:config][@split]'; 'self', text that "
    "the model writes; a list of texts; token ids (a tensor, or lists); a datasets.Dataset; a DataLoader or any "
    "iterable of dicts of tensors; a list of recordings"
)


@torch.no_grad()
def prepare_data(
    data: Any,
    model: Any,
    tokenizer_source: Callable[[], Any] | None,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    batch_size: int = 8,
) -> CalibrationData:
    """Batches of model inputs from anything that a user may pass.

    Exactly ``num_samples`` samples: where there are more they are drawn by the seed, without replacement, and keep
    their order (`from_batches` takes the first ones); where there are fewer it is an error. All samples of a batch
    have the same length, without padding; batches hold ``batch_size`` samples, or fewer. The functions named below
    say more.

    Args:
        data: a file or the id of a dataset (`read_texts`, `from_name`), "self" (`from_model`), a list of strings
            (`from_texts`), token ids (`from_ids`, `from_rows`), a `datasets.Dataset` (`from_dataset`), a DataLoader or
            an iterable of dicts of tensors (`from_batches`), a list of recordings (`from_recordings`), or what a
            pipeline recorded, which is taken whole.
        model: a language or speech model of transformers; its vocabulary and positions are compared, and it is run
            for "self" and for recordings without text.
        tokenizer_source: returns the tokenizer or processor; called only if the data needs it.
        sequence_length: tokens of a sample, at least 2.

    Raises:
        DataError: data that cannot be used; the message says what to change.
    """
    if isinstance(data, RecordedBatches):
        return data.to_data()
    request = Request(model, tokenizer_source, num_samples, sequence_length, seed, batch_size)
    if isinstance(data, str | os.PathLike):
        return _from_string(os.fspath(data), request)
    if hasattr(data, "column_names"):
        return from_dataset(data, request)
    if isinstance(data, Tensor | np.ndarray):
        return from_ids(data, request)
    if isinstance(data, Mapping):
        return from_batches([data], request, "one batch")
    if isinstance(data, list | tuple):
        return _from_list(data, request)
    if isinstance(data, Iterable) and not isinstance(data, bytes | bytearray | set | frozenset):
        return from_batches(data, request, f"batches of a {type(data).__name__}")
    raise DataError(f"a {type(data).__name__} is no calibration data: {_KINDS}")


def _from_string(text: str, request: Request) -> CalibrationData:
    if text == "self":
        return from_model(request)
    path = Path(os.path.expanduser(text))
    if os.path.isfile(path):  # unlike Path.is_file, false for a name that is too long to be one
        return from_texts(read_texts(path), request, f"text file {path.name}")
    if path.suffix.lower() in TEXT_SUFFIXES and "\n" not in text:
        raise DataError(f"there is no file {text!r}")
    if is_dataset_name(text):
        return from_name(text, request)
    raise DataError(f"{text[:80]!r} is no file and no dataset (texts themselves come as a list): {_KINDS}")


def _from_list(data: Sequence[Any], request: Request) -> CalibrationData:
    if not data:
        raise DataError("the data is an empty list")
    kinds = [_kind(item) for item in data]
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise DataError(f"item {index} is {kind} and item 0 {kinds[0]}: pass items of one kind")
    if kinds[0] == "a text":
        check_texts(data)
        return from_texts(data, request, f"list of {len(data)} texts")
    if kinds[0] == "a token id":
        return from_ids(data, request)
    if kinds[0] == "a sequence of token ids":
        return from_rows(data, request, f"list of {len(data)} token sequences")
    if kinds[0] == "a recording":
        return from_recordings(data, request, f"list of {len(data)} recordings")
    if kinds[0] == "a batch":
        return from_batches(data, request, f"list of {len(data)} batches")
    raise DataError(f"a list whose items are {type(data[0]).__name__} is no calibration data: {_KINDS}")


def _kind(item: Any) -> str:
    """What an item of a list is, by its type and shape; its type if nothing that is known."""
    if isinstance(item, str):
        return "a text"
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
        return "a token id"
    if isinstance(item, Mapping):
        return "a recording" if {"array", "audio"} & set(item) else "a batch"
    if isinstance(item, Tensor | np.ndarray):
        floating = item.is_floating_point() if isinstance(item, Tensor) else item.dtype.kind == "f"
        if item.ndim == 1 or floating:
            return "a recording" if floating else "a sequence of token ids"
        return "a batch" if isinstance(item, Tensor) else "an array"
    if isinstance(item, list | tuple):
        return "a batch" if len(item) == 1 and isinstance(item[0], Tensor) else "a sequence of token ids"
    return f"a {type(item).__name__}"
