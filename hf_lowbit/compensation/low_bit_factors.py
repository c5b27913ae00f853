"""Low-rank factors that are stored as integers themselves, fitted to each other as they are stored (CALDERA's LPLR)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.compensation.low_rank import is_diagonal, low_rank_factors, times_moment
from hf_lowbit.formats import PackedTensor, decode
from hf_lowbit.formats.factors import factor_spec
from hf_lowbit.rounding.clip import fit_clipped, fit_range
from hf_lowbit.rounding.store import round_with

_ROUNDS = 5  # CALDERA's lplr_iters
_CLIPPED = 4  # bits up to which clipping the range of a group pays


class LowBitFactors(NamedTuple):
    """Factors as they are stored.

    Attributes:
        a: A ``[rank, columns]``.
        b: B^T ``[rank, rows]``: codes lie along the output.
    """

    a: PackedTensor
    b: PackedTensor

    def decoded(self) -> tuple[Tensor, Tensor]:
        """float32 A ``[rank, columns]`` and B ``[rows, rank]``: what the layer computes with."""
        return decode(self.a), decode(self.b).mT


def low_bit_factors(
    error: Tensor, rank: int, bits: int, weighting: Tensor | None = None, rounds: int = _ROUNDS
) -> LowBitFactors:
    """Factors of ``bits`` bits that approximate a rounding error together.

    The exact solution is rounded; then in turns each factor is solved for, in closed form, against the other one as
    rounded, and is rounded itself (LPLR of CALDERA, arXiv 2405.18886). The best pair is kept, because rounding
    may make a turn worse. Rounding is to nearest, of 4 bits on searched ranges [ours].

    Args:
        error: float ``[rows, columns]``.
        rank: 1 to min(rows, columns).
        bits: 8 or 4, stored as :func:`hf_lowbit.formats.factors.factor_spec` says.
        weighting: as for :func:`hf_lowbit.compensation.low_rank_factors`, of one matrix.
        rounds: turns of both factors; 0 rounds the exact solution only.

    Raises:
        ValueError: a rank or a weighting that does not fit.
        RoundingError: an error that is not finite.
    """
    if rank < 1:
        raise ValueError(f"factors of few bits have a rank of at least 1, not {rank}")
    exact, importance = error.double(), _importance(weighting, error.shape[-1])
    a, b = low_rank_factors(error, rank, weighting)
    read = times_moment(exact, weighting)
    best = LowBitFactors(_rounded(a, bits, importance), _rounded(b.mT, bits))
    least = _change(read, best, weighting)
    packed_b = best.b
    for _ in range(rounds):
        packed_a = _rounded(_fit_a(exact, decode(packed_b).double().mT), bits, importance)
        packed_b = _rounded(_fit_b(read, decode(packed_a).double(), weighting).mT, bits)
        found = LowBitFactors(packed_a, packed_b)
        change = _change(read, found, weighting)
        if change < least:
            best, least = found, change
    return best


def _fit_a(error: Tensor, b: Tensor) -> Tensor:
    """The best A for a given B, whatever the inputs: (B^T B)^+ B^T E."""
    return torch.linalg.pinv(b.mT @ b, hermitian=True) @ (b.mT @ error)


def _fit_b(read: Tensor, a: Tensor, weighting: Tensor | None) -> Tensor:
    """The best B for a given A, from E R: E R A^T (A R A^T)^+."""
    return (read @ a.mT) @ torch.linalg.pinv(times_moment(a, weighting) @ a.mT, hermitian=True)


def _rounded(factor: Tensor, bits: int, importance: Tensor | None = None) -> PackedTensor:
    fit = fit_clipped if bits <= _CLIPPED else fit_range
    return round_with(fit, factor.float().contiguous(), factor_spec(bits, factor.shape[-1]), importance)


def _importance(weighting: Tensor | None, columns: int) -> Tensor | None:
    """Mean square of every column's input."""
    if weighting is None:
        return None
    return weighting.reshape(-1).square() if is_diagonal(weighting, columns) else weighting.diagonal()


def _change(read: Tensor, factors: LowBitFactors, weighting: Tensor | None) -> float:
    """What factors add to tr(E R E^T), below zero if they help: tr(B A R A^T B^T) - 2 tr(E R A^T B^T), from E R."""
    a, b = (factor.double() for factor in factors.decoded())
    own = (b.mT @ b) * (times_moment(a, weighting) @ a.mT)
    return (own.sum() - 2 * (b * (read @ a.mT)).sum()).item()
