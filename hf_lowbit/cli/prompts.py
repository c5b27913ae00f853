"""Prompts of a command line: themselves, or files of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_lowbit.cli.errors import RequestError


def read_prompts(values: Sequence[str]) -> list[str]:
    """Prompts as given, and each line of what ends with .txt.

    Raises:
        RequestError: a file that is not there or is no text, or no prompt at all.
    """
    found: list[str] = []
    for value in values:
        if Path(value).suffix != ".txt":
            found.append(value.strip())
            continue
        if not Path(value).is_file():
            raise RequestError(f"there is no file {value!r}")
        try:
            found += [line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise RequestError(f"{value} cannot be read as text: {error}") from None
    found = [prompt for prompt in found if prompt]
    if not found:
        raise RequestError("there is no prompt: --prompts takes a text, a class label, or a .txt file of them")
    return found
