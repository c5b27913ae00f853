"""How low-rank factors of few bits are stored."""

from __future__ import annotations

from hf_lowbit.formats.spec import WeightSpec

FACTOR_BITS = (16, 8, 4)
_GROUP = 64
_SMALLEST_GROUP = 16  # a smaller one would cost more than a bit per value


def factor_spec(bits: int, columns: int) -> WeightSpec:
    """Of A ``[rank, in]`` and of B^T ``[rank, out]``: symmetric integers, a bfloat16 scale per group of a rank's row.

    Groups are the largest that divide the row, up to 64; a row that only smaller ones than 16 divide has one scale.

    Args:
        bits: 8 or 4.
        columns: of the factor, at least one.
    """
    group = next(size for size in range(_GROUP, 0, -1) if columns % size == 0)
    return WeightSpec("int", bits, group if group >= _SMALLEST_GROUP else None)
