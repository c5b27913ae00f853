"""Prompt agreement: whether a classifier sees in a picture what the prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor


def labels_of_prompts(prompts: Sequence[str | int], labels: Sequence[str]) -> Tensor:
    """The class that each prompt asks for, int64 [n]; -1 where it names none, or several.

    Args:
        prompts: texts that hold a label as words ("a photo of an ankle boot"), of which the longest counts where one is
            part of another ("t-shirt", "shirt"); or classes, as numbers or as their digits.
        labels: names of the classes, in order.
    """
    return torch.tensor([_class_of(prompt, labels) for prompt in prompts], dtype=torch.int64)


def agreement(logits: Tensor, wanted: Tensor) -> Tensor:
    """1 where the largest of the logits [n, classes] is the wanted class, else 0; float64 [n].

    Raises:
        ValueError: another number of classes wanted than pictures.
    """
    if len(logits) != len(wanted):
        raise ValueError(f"{len(logits)} pictures and {len(wanted)} wanted classes")
    return (logits.argmax(1) == wanted.to(logits.device)).double()


def _class_of(prompt: str | int, labels: Sequence[str]) -> int:
    if isinstance(prompt, int) or prompt.strip().isdecimal():
        return int(prompt) if int(prompt) < len(labels) else -1
    text, found = prompt.lower(), []
    for index in sorted(range(len(labels)), key=lambda index: -len(labels[index])):
        pattern = rf"(?<![\w-]){re.escape(labels[index].lower())}(?:e?s)?(?![\w-])"
        text, count = re.subn(pattern, "", text)
        found += [index] if count else []
    return found[0] if len(found) == 1 else -1
