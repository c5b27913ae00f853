"""Texts in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_lowbit.calibration.data.result import DataError
from hf_lowbit.calibration.data.text import check_texts

TEXT_SUFFIXES = (".txt", ".json", ".jsonl")


def read_texts(path: Path) -> list[str]:
    """The texts of a file: all of a .txt as one; the items of a .json list or the lines of a .jsonl, in either case
    strings or records with a field "text".

    Raises:
        DataError: another kind of file, one that cannot be read, or one with anything else in it.
    """
    records = read_records(path)
    texts: list[Any] = [record.get("text") if isinstance(record, dict) else record for record in records]
    for index, text in enumerate(texts):
        if text is None:
            raise DataError(f"{path.name}: record {index} has no field 'text'")
    check_texts(texts, f"{path.name}: text")
    return texts


def read_records(path: Path) -> list[Any]:
    """What a file of :func:`read_texts` lists, whatever it is. Raises DataError for one that is no such file."""
    suffix = path.suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        raise DataError(f"{path.name}: a file with texts ends with {', '.join(TEXT_SUFFIXES)}")
    try:
        content = path.read_text(encoding="utf-8")
        records = [content] if suffix == ".txt" else _parse(content, suffix)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path.name} cannot be read as {suffix} text: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path.name} must hold a list of strings, or of records with a field 'text'")
    return records


def _parse(content: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(content)
    return [json.loads(line) for line in content.splitlines() if line.strip()]
