"""Rounding a block's matrices by the second moments of their inputs: the loop of GPTQ, and of what is built on it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import Matrix, as_read
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import PackedTensor
from hf_lowbit.rounding.gptq import CholeskyError

__all__ = ["Rounded", "as_read", "round_second_order"]

_S = TypeVar("_S", bound=Hessian)


class Rounded(Protocol):
    """What a rounding returns: :class:`hf_lowbit.rounding.gptq.GPTQResult`, or more than that."""

    @property
    def packed(self) -> PackedTensor: ...

    @property
    def damping(self) -> float: ...


def round_second_order(
    block: Block,
    rounding: Callable[[Matrix, _S], Rounded],
    damping: float = 0.01,
    keys: Collection[str] | None = None,
    make: Callable[[int, torch.device], _S] = Hessian,  # type: ignore[assignment]
) -> None:
    """Pack matrices of a block, all statistics collected first; what cannot be treated is rounded to nearest and noted.

    Args:
        rounding: of a matrix with the statistic of its inputs; it may note something, and raises CholeskyError where no
            damping helps.
        damping: that is usual; more of it is noted.
        keys: of :attr:`Block.matrices`; None for all that are left.
        make: channels, device -> an empty statistic.
    """
    for key, statistic in block.collect(make, keys).items():
        matrix = block.matrices[key]
        if statistic.tokens == 0:
            block.round_unreached(key)
            continue
        try:
            result = rounding(matrix, statistic)
        except CholeskyError as problem:
            block.round_to_nearest(key, f"{problem}: rounded to nearest")
            continue
        if result.damping > damping:
            block.note(key, f"its Hessian needed damping={result.damping:g}")
        block.pack(key, result.packed)
