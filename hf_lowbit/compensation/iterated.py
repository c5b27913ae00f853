"""Rounding and low-rank factors in turns: each makes up for what the other left (LoftQ, LQ-LoRA, CALDERA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hf_lowbit.compensation.low_rank import low_rank_factors, weighted_error

Solve = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


class Alternation(NamedTuple):
    """The best iterate, and the way there.

    Attributes:
        target: what was rounded, W - B A of the iterate before; W itself in the first.
        rounded: what it was rounded to, Q.
        a, b: A ``[..., rank, columns]`` and B ``[..., rows, rank]`` of W - Q.
        errors: tr(E R E^T) of E = W - Q - B A, summed over a stack, for every iterate.
        best: which of them this is.
    """

    target: Tensor
    rounded: Tensor
    a: Tensor
    b: Tensor
    errors: list[float]
    best: int


def alternate(
    weight: Tensor,
    rank: int,
    rounding: Callable[[Tensor], Tensor],
    iterations: int = 1,
    weighting: Tensor | None = None,
    solve: Solve = low_rank_factors,
) -> Alternation:
    """Q = q(W - B A), then A and B of W - Q, ``iterations`` times (LoftQ, arXiv 2310.08659).

    The first iterate is the plain compensation of a rounded weight. Errors need not fall from one to the next, so the
    best is kept (LQ-LoRA, arXiv 2311.12023, stops when they rise). With a weighting and factors of few bits this is
    CALDERA's loop (arXiv 2405.18886), "Q" first.

    Args:
        weight: float ``[..., rows, columns]``.
        rank: of A and B.
        rounding: float weights -> what they are read back as, of the same shape.
        iterations: at least 1.
        weighting: as for :func:`low_rank_factors`.
        solve: error, rank, weighting -> A and B as they are read back: others than float32 ones are judged as stored.

    Raises:
        ValueError: no iteration, or what ``solve`` refuses.
    """
    if iterations < 1:
        raise ValueError(f"rounding and factors take at least one turn, not {iterations}")
    exact = target = weight.float()
    best: Alternation | None = None
    errors: list[float] = []
    for turn in range(iterations):
        rounded = rounding(target).float()
        a, b = solve(exact - rounded, rank, weighting)
        product = b @ a
        errors.append(weighted_error(exact - rounded - product, weighting).sum().item())
        if best is None or errors[turn] < errors[best.best]:
            best = Alternation(target, rounded, a, b, errors, turn)
        target = exact - product
    assert best is not None
    return best
