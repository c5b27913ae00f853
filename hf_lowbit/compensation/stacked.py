"""The factors of one stored parameter: stacks of experts, stacked projections, factors of few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.compensation.iterated import alternate
from hf_lowbit.compensation.low_bit_factors import low_bit_factors
from hf_lowbit.compensation.low_rank import low_rank_factors
from hf_lowbit.formats import PackedTensor
from hf_lowbit.formats.factors import factor_spec
from hf_lowbit.nn.factors import Factors, decoded_factors
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.store import stack

Weighting = Tensor | Sequence[Tensor | None] | None
"""As for :func:`hf_lowbit.compensation.low_rank_factors`; of a stack a list with one for each of its matrices."""


def stacked_factors(
    error: Tensor, rank: int, bits: int = 16, branches: int = 1, weighting: Weighting = None
) -> Factors:
    """Factors of a rounding error as a packed layer stores them.

    Args:
        error: float ``[rows, columns]``, or ``[matrices, rows, columns]``.
        rank: of every branch.
        bits: 16, 8 or 4.
        branches: projections stacked along the rows, with factors of their own.
        weighting: of the inputs, which stacked projections share.

    Raises:
        ValueError: a rank or a weighting that does not fit.
    """
    if error.dim() == 3 and (bits < 16 or weighting is not None):
        own = weighting if isinstance(weighting, Sequence) else [weighting] * len(error)
        parts = [stacked_factors(e, rank, bits, branches, w) for e, w in zip(error, own, strict=True)]
        a, b = ([part[index] for part in parts] for index in range(2))
        return (stack(a), stack(b)) if bits < 16 else (torch.stack(a), torch.stack(b))  # type: ignore[arg-type]
    assert weighting is None or isinstance(weighting, Tensor)
    blocks = error.chunk(branches, -2)
    if bits == 16:
        floats = [low_rank_factors(block, rank, weighting) for block in blocks]
        return torch.cat([a for a, _ in floats], -2), torch.cat([b for _, b in floats], -2)
    coded = [low_bit_factors(block, rank, bits, weighting) for block in blocks]
    return _joined([pair.a for pair in coded]), _joined([pair.b for pair in coded])


def encoded_factors(a: Tensor, b: Tensor, bits: int, branches: int = 1) -> Factors:
    """A ``[..., branches * rank, columns]`` and B ``[..., rows, rank]`` that a method chose, as a layer stores them."""
    if bits == 16:
        return a, b
    along = torch.cat([part.mT for part in b.chunk(branches, -2)], -2)
    spec_a, spec_b = (factor_spec(bits, factor.shape[-1]) for factor in (a, along))
    return round_to_nearest(a.contiguous(), spec_a), round_to_nearest(along.contiguous(), spec_b)


def target_of_rounding(
    weight: Tensor,
    rounding: Callable[[Tensor], Tensor],
    rank: int,
    iterations: int,
    bits: int = 16,
    branches: int = 1,
    weighting: Weighting = None,
) -> Tensor:
    """What to round so that rounding and factors together leave least: W - B A of the best iterate before.

    :func:`hf_lowbit.compensation.iterated.alternate` for each matrix of a stack by itself.

    Args:
        weight: float ``[rows, columns]``, or ``[matrices, rows, columns]``.
        rounding: weights ``[rows, columns]`` -> what they decode to.
    """
    if weight.dim() == 3:
        own = weighting if isinstance(weighting, Sequence) else [weighting] * len(weight)
        parts = (rank, iterations, bits, branches)
        return torch.stack([target_of_rounding(w, rounding, *parts, s) for w, s in zip(weight, own, strict=True)])

    assert weighting is None or isinstance(weighting, Tensor)

    def solve(error: Tensor, rank: int, weighting: Tensor | None) -> tuple[Tensor, Tensor]:
        return decoded_factors(stacked_factors(error, rank, bits, weighting=weighting), branches=1)

    blocks = [alternate(block, rank, rounding, iterations, weighting, solve) for block in weight.chunk(branches, -2)]
    return torch.cat([block.target for block in blocks], -2)


def _joined(parts: list[PackedTensor]) -> PackedTensor:
    """One above the other."""
    if len(parts) == 1:
        return parts[0]
    weight, scale = (torch.cat([getattr(part, name) for part in parts], -2) for name in ("weight", "scale"))
    return replace(parts[0], weight=weight, scale=scale)
