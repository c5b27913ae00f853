"""Texts, tokenized, joined and cut into windows of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.calibration.data.limits import check_ids, check_length, require_language_model
from hf_lowbit.calibration.data.request import Request, batch_rows
from hf_lowbit.calibration.data.result import CalibrationData, DataError, to_result
from hf_lowbit.calibration.data.tokenizer import load_tokenizer

_TEXTS_AT_ONCE = 256


def from_texts(
    texts: Iterable[str], request: Request, description: str, *, lines: bool = False, max_windows: int | None = None
) -> CalibrationData:
    """Windows of ``sequence_length`` tokens, drawn by the seed from all of them.

    The rule of the perplexity measurement: texts are tokenized without special tokens and cut into windows that do
    not overlap, each with the BOS token first if the tokenizer has one. Before that they are joined by the EOS token,
    or by an empty line where the tokenizer has none. What does not fill a last window is left out.

    Args:
        lines: the texts are lines of one text, joined as they are.
        max_windows: no more of the texts is read than fills this many windows.

    Raises:
        DataError: no language model, no tokenizer or another model's, more tokens than positions, or too little text.
    """
    require_language_model(request.model, "texts")
    check_length(request.sequence_length, request.model)
    tokenizer = load_tokenizer(request)
    limit = None if max_windows is None else max_windows * request.sequence_length
    windows = cut(join_ids(tokenizer, texts, lines, limit), request.sequence_length, _token_id(tokenizer, "bos"))
    unit = f"windows of {request.sequence_length} tokens"
    chosen = request.choose(len(windows), unit, "give more text, or lower num_samples or sequence_length")
    rows = windows[chosen]
    check_ids(rows, request.model)
    return to_result(batch_rows(list(rows), request.batch_size), description, tokenizer.decode(rows[0].tolist()))


def check_texts(texts: Sequence[Any], what: str = "text") -> None:
    """Raise DataError unless every item is a string that says something."""
    if not texts:
        raise DataError("the data is empty: no text in it")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{what} {index} is a {type(text).__name__}; all must be strings")
        if not text.strip():
            raise DataError(f"{what} {index} is empty; leave it out")


def cut(ids: Sequence[int] | Tensor, sequence_length: int, bos_token_id: int | None = None) -> Tensor:
    """Cut token ids into windows without overlap, each with the BOS token first if there is one.

    Returns:
        int64 [windows, ``sequence_length``]; ids that fill no window are dropped.
    """
    step = sequence_length - (bos_token_id is not None)
    count = len(ids) // step
    windows = torch.as_tensor(ids[: count * step], dtype=torch.int64).reshape(count, step)
    if bos_token_id is None:
        return windows
    return torch.cat([torch.full((count, 1), bos_token_id), windows], dim=1)


def join_ids(tokenizer: Any, texts: Iterable[str], lines: bool, limit: int | None) -> list[int]:
    """Token ids of the joined texts, at most about ``limit`` of them."""
    eos = None if lines else _token_id(tokenizer, "eos")
    separator = "" if lines or eos is not None else "\n\n"
    ids: list[int] = []
    for chunk in _chunks(texts):
        # The separator is tokenized with the text after it, never alone: that could give other tokens.
        whole = [text if index == 0 and not ids else separator + text for index, text in enumerate(chunk)]
        for piece in tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]:
            if ids and eos is not None:
                ids.append(eos)
            ids.extend(piece)
        if limit is not None and len(ids) >= limit:
            break
    return ids


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, _TEXTS_AT_ONCE)):
        yield chunk


def _token_id(tokenizer: Any, name: str) -> int | None:
    return getattr(tokenizer, f"{name}_token_id", None)
