"""Datasets of the library of that name: by their id, by their folder, or loaded by the user."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from hf_lowbit.calibration.data.audio import from_recordings
from hf_lowbit.calibration.data.request import Request
from hf_lowbit.calibration.data.result import CalibrationData, DataError
from hf_lowbit.calibration.data.text import from_texts
from hf_lowbit.calibration.data.tokens import from_rows

_SPEC = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>\S+))?")
_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

# Short names: the id, and the config where none is given. Their rows are lines of a text.
_LINES = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}

_BLOCK_ROWS = 256
# So many times the windows that are needed are read from a dataset: enough to draw from, and large ones stay unread.
_SURPLUS = 4


def is_dataset_name(text: str) -> bool:
    """Whether a string may name a dataset: ``name``, ``org/name`` or a folder, with ``:config`` and ``@split``."""
    match = _SPEC.fullmatch(text)
    return match is not None and (_ID.fullmatch(match["name"]) is not None or os.path.isdir(match["name"]))


def from_name(text: str, request: Request) -> CalibrationData:
    """A dataset by its id, ``name[:config][@split]``, read with `datasets.load_dataset` (downloaded whole).

    Without a split it is "train"; a split may be a slice such as ``train[:1000]``. "wikitext" stands for
    ``Salesforce/wikitext:wikitext-2-raw-v1``, whose lines are joined as they are.

    Raises:
        DataError: the package datasets is absent, the dataset cannot be loaded, or `from_dataset` refuses it.
    """
    dataset, shown, lines = open_dataset(text)
    return from_dataset(dataset, request, f"dataset {shown}", lines=lines)


def open_dataset(text: str) -> tuple[Any, str, bool]:
    """A dataset by its id, its name for people, and whether its rows are lines of one text. See :func:`from_name`."""
    match = _SPEC.fullmatch(text)
    assert match is not None  # by is_dataset_name
    name, default = _LINES.get(match["name"], (match["name"], None))
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError('datasets by their name need the package datasets: pip install "hf_lowbit[eval]"') from error
    try:
        dataset = load_dataset(name, match["config"] or default, split=match["split"] or "train")
    except Exception as error:
        raise DataError(
            f"{text!r} is no file, and no dataset that can be loaded ({type(error).__name__}: {error}). "
            "A dataset is named as name, org/name or a folder, with :config and @split where they are needed"
        ) from error
    shown = os.path.basename(os.path.normpath(text)) if os.path.isdir(match["name"]) else text
    return dataset, shown, name in {known for known, _ in _LINES.values()}


def from_dataset(
    dataset: Any, request: Request, description: str | None = None, *, lines: bool = False
) -> CalibrationData:
    """A `datasets.Dataset` or `IterableDataset`, by its columns.

    "audio" for a speech model; else "input_ids" (one sample a row), "text", "content" or the only column of strings.
    Texts are joined as `from_texts` does it, empty rows left out. They are read in blocks of 256 rows, in an order
    drawn by the seed, until there are four times the windows that are needed; a streamed dataset is read from its
    beginning.

    Raises:
        DataError: several splits, no rows, no such column, a package that decodes its rows is absent.
    """
    if isinstance(dataset, Mapping):
        raise DataError(f"this is a dataset of several splits: pass one of {', '.join(map(repr, dataset))}")
    try:
        first = next(iter(dataset), None)
    except ImportError as error:  # such as the decoder of recordings
        raise DataError(f"the dataset's rows cannot be decoded: {error}") from error
    if first is None:
        raise DataError("the dataset has no rows")
    column = text_column(first, getattr(request.model, "main_input_name", None))
    described = description or f"{type(dataset).__name__}, column {column!r}"
    if column == "audio":
        return from_recordings(_rows(dataset, request), request, described)
    if column == "input_ids":
        rows = _rows(dataset, request)
        return from_rows([row[column] for row in rows] if isinstance(rows, list) else rows[column], request, described)
    texts = _texts(dataset, column, request)
    return from_texts(texts, request, described, lines=lines, max_windows=_SURPLUS * request.num_samples)


def text_column(row: Mapping[str, Any], main_input: str | None) -> str:
    """The column that data is taken from, by the first row and the model's main input. Raises DataError for none."""
    if "audio" in row and main_input != "input_ids":
        return "audio"
    for name in ("input_ids", "text", "content"):
        if name in row:
            return name
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"the dataset has the columns {', '.join(map(repr, row))}; it needs 'text', 'content', 'input_ids' or a single "
        "column of strings (or 'audio', for a speech model): rename or select columns"
    )


def _rows(dataset: Any, request: Request) -> Any:
    """Something with a length and rows: the dataset itself, or the first rows of a stream."""
    return dataset if hasattr(dataset, "__len__") else list(islice(dataset, request.num_samples))


def _texts(dataset: Any, column: str, request: Request) -> Iterator[str]:
    for index, text in enumerate(_cells(dataset, column, request)):
        if text is not None and not isinstance(text, str):
            raise DataError(f"column {column!r}, text {index} is a {type(text).__name__}; all must be strings")
        if text:
            yield text


def _cells(dataset: Any, column: str, request: Request) -> Iterator[Any]:
    if not hasattr(dataset, "__len__"):
        yield from (row[column] for row in dataset)
        return
    only = dataset.select_columns([column])
    blocks = -(-len(only) // _BLOCK_ROWS)
    for block in torch.randperm(blocks, generator=request.generator()).tolist():
        yield from only[block * _BLOCK_ROWS : (block + 1) * _BLOCK_ROWS][column]
