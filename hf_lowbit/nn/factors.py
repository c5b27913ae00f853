"""Low-rank factors as a packed layer stores them: bfloat16 bit patterns, or codes with a scale per group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, SpecError, decode
from hf_lowbit.formats.factors import FACTOR_BITS, factor_spec
from hf_lowbit.formats.packed import from_bits, to_bits

FACTOR_DTYPE = "bfloat16"  # of factors of 16 bits, and of the scales of others

Factors = tuple[Tensor | PackedTensor, Tensor | PackedTensor]
"""Of 16 bits: floats A ``[..., branches * rank, columns]`` and B ``[..., rows, rank]``. Of fewer: codes of A, and of B
laid along its rows, ``[..., branches * rank, rows / branches]``, so that a scale belongs to one rank."""


def check_factor_bits(bits: object) -> None:
    """Raise SpecError for a width that factors cannot have."""
    if type(bits) is not int or bits not in FACTOR_BITS:
        raise SpecError(f"factor_bits must be one of {', '.join(map(str, FACTOR_BITS))}, not {bits!r}")


def factor_shapes(
    leading: tuple[int, ...], columns: int, rank: int, branches: int, bits: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Part -> (shape, dtype) of what is stored for the factors of a matrix ``[*leading, columns]``."""
    ranks = (*leading[:-1], rank * branches)
    if bits == 16:
        return {"a": ((*ranks, columns), torch.int16), "b": ((*leading, rank), torch.int16)}
    return {
        f"{part}{suffix}": value
        for part, width in (("a", columns), ("b", leading[-1] // branches))
        for suffix, value in factor_spec(bits, width).companions(ranks, width).items()
    }


def stored_factors(factors: Factors) -> dict[str, Tensor]:
    """Part -> tensor, as :func:`factor_shapes` has them."""
    stored: dict[str, Tensor] = {}
    for part, factor in (("a", factors[0]), ("b", factors[1])):
        if isinstance(factor, PackedTensor):
            stored |= {f"{part}{suffix}": tensor for suffix, tensor in factor.tensors().items()}
        else:
            stored[part] = to_bits(factor, FACTOR_DTYPE)
    return stored


def read_factors(
    parts: Mapping[str, Tensor], rows: int, columns: int, branches: int, bits: int
) -> tuple[Tensor, Tensor]:
    """float32 A ``[..., branches * rank, columns]`` and B ``[..., rows, rank]`` of stored parts."""
    if bits == 16:
        return from_bits(parts["a"], FACTOR_DTYPE), from_bits(parts["b"], FACTOR_DTYPE)
    width = rows // branches
    a = PackedTensor(parts["a"], parts["a_scale"], factor_spec(bits, columns), columns)
    return decoded_factors((a, PackedTensor(parts["b"], parts["b_scale"], factor_spec(bits, width), width)), branches)


def decoded_factors(factors: Factors, branches: int) -> tuple[Tensor, Tensor]:
    """float32 A and B as they will be read back."""
    a, b = factors
    if isinstance(a, PackedTensor) and isinstance(b, PackedTensor):
        return decode(a), torch.cat([part.mT for part in decode(b).chunk(branches, -2)], -2)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return a.bfloat16().float(), b.bfloat16().float()


def expand_low_rank(a: Tensor, b: Tensor, branches: int) -> Tensor:
    """B A for stacked projections: rows of the i-th share the i-th block of A."""
    parts = [part @ block for part, block in zip(b.chunk(branches, -2), a.chunk(branches, -2), strict=True)]
    return torch.cat(parts, -2)
