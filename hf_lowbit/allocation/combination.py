"""Layers that share something, such as their bits, and choose the rest each for itself."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowbit.allocation.integer_program import Option, undominated

_MOST = 512  # sums that are kept of a group of many layers


def combined(layers: Sequence[Sequence[Option]]) -> list[tuple[Option, tuple[int, ...]]]:
    """What a group of layers can store and lose together, the smallest first.

    Args:
        layers: for each, what it may become.

    Returns:
        Sums that no other sum beats in both size and loss, at most 512 of them, evenly spread, each with the index of
        every layer's option.
    """
    front: list[tuple[Option, tuple[int, ...]]] = [(Option(0, 0.0), ())]
    for choices in layers:
        sums = [
            (Option(total.bits + option.bits, total.loss + option.loss), (*picks, index))
            for total, picks in front
            for index, option in enumerate(choices)
        ]
        kept = undominated([total for total, _ in sums])
        if len(kept) > _MOST:
            kept = [kept[round(i * (len(kept) - 1) / (_MOST - 1))] for i in range(_MOST)]
        front = [sums[index] for index in kept]
    return front
