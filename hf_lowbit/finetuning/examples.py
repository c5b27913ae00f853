"""Texts and conversations as rows of token ids and labels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.calibration.data import DataError
from hf_lowbit.calibration.data.datasets import is_dataset_name, open_dataset, text_column
from hf_lowbit.calibration.data.files import TEXT_SUFFIXES, read_records, read_texts
from hf_lowbit.calibration.data.text import cut, join_ids

IGNORED = -100  # the label of a token whose prediction does not count
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Examples:
    """Rows ``{"input_ids", "labels"}`` of at most ``max_length`` tokens, and what to say about them.

    Attributes:
        texts: what they were made of, for a method that calibrates.
    """

    rows: list[Row]
    description: str
    texts: list[str]

    @property
    def fingerprint(self) -> str:
        """Sha256 of all rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def split(self, part: float, seed: int) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and at least one and at most 64 to hold out, drawn by the seed."""
        count = min(64, max(1, round(part * len(self.rows))))
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self.rows[i] for i in sorted(order[count:])], [self.rows[i] for i in sorted(order[:count])]


def read_examples(data: str, tokenizer: Any, max_length: int) -> Examples:
    """Rows of a file or dataset.

    Texts ("text" of a record, or lines and files of them) are joined by the EOS token and cut into windows, all of
    whose tokens count. Conversations ("messages" of a record) are one row each, through the tokenizer's chat template;
    the loss is on what the assistant says, where the template lets its turns be told apart.

    Args:
        data: a file (.txt, .json, .jsonl), or the name of a dataset.

    Raises:
        DataError: no such file or dataset, or nothing that can be trained on in it.
    """
    path = Path(os.path.expanduser(data))
    lines = False
    if os.path.isfile(path):
        shown, records = path.name, read_records(path)
        is_chat = bool(records) and isinstance(records[0], dict) and "messages" in records[0]
        items: list[Any] = [_messages(record, shown) for record in records] if is_chat else list(read_texts(path))
    elif path.suffix.lower() in TEXT_SUFFIXES or not is_dataset_name(data):
        raise DataError(f"there is no file {data!r}")
    else:
        dataset, shown, lines = open_dataset(data)
        first = next(iter(dataset), None)
        if first is None:
            raise DataError(f"the dataset {shown} has no rows")
        is_chat = "messages" in first
        column = "messages" if is_chat else text_column(first, "input_ids")
        if column == "input_ids":
            raise DataError(f"the dataset {shown} holds token ids; fine-tuning takes texts or conversations")
        items = [row[column] for row in dataset if row[column]]
    if is_chat:
        return _from_chats(items, tokenizer, max_length, shown)
    ids = join_ids(tokenizer, items, lines, None)
    windows = cut(ids, max_length, getattr(tokenizer, "bos_token_id", None)).tolist()
    rows = [{"input_ids": window, "labels": window} for window in windows]
    return Examples(rows, f"{shown}: windows of {max_length} tokens", items)


def collate(rows: Sequence[Row], padding: int) -> dict[str, Tensor]:
    """A batch, padded on the right: int64 ``[rows, longest]``."""
    longest = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": stack("input_ids", padding), "labels": stack("labels", IGNORED), "attention_mask": mask}


def _messages(record: Any, shown: str) -> list[dict[str, Any]]:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{shown}: a record without 'messages' among records that have them")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{shown}: a message is an object with 'role' and 'content', not {message!r:.80}")
    return messages


def _from_chats(chats: list[list[dict[str, Any]]], tokenizer: Any, max_length: int, shown: str) -> Examples:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{shown} holds conversations, and the model's tokenizer has no chat template for them")
    made = [_chat_row(messages, tokenizer) for messages in chats]
    clean = all(row is not None for row in made)
    if not clean:  # a template that writes earlier turns anew: nobody can say where an answer begins
        whole = [_ids(messages, tokenizer) for messages in chats]
        made = [{"input_ids": ids, "labels": ids} for ids in whole]
    cut_rows = [{name: ids[:max_length] for name, ids in row.items()} for row in made if row is not None]
    rows = [row for row in cut_rows if any(label != IGNORED for label in row["labels"][1:])]
    counted = "the assistant's turns" if clean else "all turns, which this chat template does not let be told apart"
    left_out = f"; {len(made) - len(rows)} without an answer in the first {max_length} tokens" * (len(rows) < len(made))
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in chats]
    return Examples(rows, f"{shown}: {len(rows)} conversations, the loss on {counted}{left_out}", texts)


def _chat_row(messages: list[dict[str, Any]], tokenizer: Any) -> Row | None:
    """A conversation with the labels of the assistant's turns; None where a turn is no continuation of those before."""
    ids = _ids(messages, tokenizer)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _ids(messages[:index], tokenizer, add_generation_prompt=True) if index else []
        after = _ids(messages[: index + 1], tokenizer)
        if ids[: len(after)] != after or after[: len(before)] != before:
            return None
        labels[len(before) : len(after)] = after[len(before) :]
    return {"input_ids": ids, "labels": labels}


def _ids(messages: list[dict[str, Any]], tokenizer: Any, add_generation_prompt: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids
