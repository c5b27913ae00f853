"""SVDQuant's decomposition: a low-rank branch takes a weight's dominant directions, codes take what is left.

Of a smoothed weight W the branch B A is the truncated singular value decomposition, and codes are those of W - B A (Li
et al., arXiv 2411.05007, section 4.2). Layers that read the same input can share A: theirs is the decomposition of all
their weights, one above the other. In turns, the next branch is that of W less what the codes decode to; the first one
that does not lower the error of the layers' outputs ends it, and the best is kept (the authors' code).

[ours]: residuals are those of the factors as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.compensation.low_rank import low_rank_factors
from hf_lowbit.compensation.stacked import encoded_factors
from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens
from hf_lowbit.nn import LayerSpec
from hf_lowbit.nn.factors import decoded_factors, expand_low_rank
from hf_lowbit.rounding.completing import round_completely

Solve = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # matrix, rank -> A, B
_OVERSAMPLING, _POWERS = 10, 4  # of the sketch


@dataclass(frozen=True)
class Part:
    """One matrix to be decomposed.

    Attributes:
        weight: float ``[rows, columns]``, as its layer's transform leaves it.
        spec: of its layer: codes, inputs, rank and factors.
        branches: projections stacked along the rows, with factors of their own.
    """

    weight: Tensor
    spec: LayerSpec
    branches: int = 1


@dataclass(frozen=True)
class Absorbed:
    """Matrices of one input, decomposed.

    Attributes:
        factors: A ``[branches * rank, columns]`` and B ``[rows, rank]`` of each, float32, as they will be read back.
        residuals: W - B A, float32.
        packed: their codes.
        error: squared, of all outputs on the inputs; without inputs of all weights.
    """

    factors: list[tuple[Tensor, Tensor]]
    residuals: list[Tensor]
    packed: list[PackedTensor]
    error: float


@torch.no_grad()
def absorb(
    parts: Sequence[Part],
    inputs: Tensor | None = None,
    *,
    iterations: int = 1,
    share: bool = True,
    solve: Solve = low_rank_factors,
    rounding: Callable[[Tensor, WeightSpec], PackedTensor] = round_completely,
) -> Absorbed:
    """Decompose the matrices that read one input.

    Args:
        parts: of equal columns.
        inputs: float ``[tokens, columns]``, as the layers' transform leaves them; they are quantized as ``spec`` says
            for the codes, and not for the branch.
        iterations: at most, of branch and codes in turns.
        share: one A for all of equal rank, and no others stacked inside them.
        solve: finds a branch.
        rounding: of what is left.

    Raises:
        ValueError: a rank that exceeds a matrix.
    """
    weights = [part.weight.float() for part in parts]
    targets, best = weights, None
    for _ in range(max(1, iterations)):
        factors = _factors(parts, targets, share, solve)
        residuals = [
            weight - expand_low_rank(*pair, part.branches)
            for part, weight, pair in zip(parts, weights, factors, strict=True)
        ]
        packed = [rounding(rest, part.spec.weight) for part, rest in zip(parts, residuals, strict=True)]
        decoded = [decode(codes) for codes in packed]
        error = sum(
            _error(part, weight, pair, codes, inputs)
            for part, weight, pair, codes in zip(parts, weights, factors, decoded, strict=True)
        )
        if best is not None and not error < best.error:
            break
        best = Absorbed(factors, residuals, packed, error)
        if not any(part.spec.low_rank for part in parts):
            break
        targets = [weight - codes for weight, codes in zip(weights, decoded, strict=True)]
    assert best is not None
    return best


def sketched_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Nearly :func:`low_rank_factors`, several times faster: a randomized range finder (Halko et al., arXiv 0909.4061).

    For trials: with ten vectors more than the rank and four powers; always the same random ones. Exact where that is no
    saving.
    """
    size = rank + _OVERSAMPLING
    if rank == 0 or 3 * size >= min(matrix.shape):
        return low_rank_factors(matrix, rank)
    random = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = torch.linalg.qr(matrix @ random).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root.unsqueeze(1) * vh[:rank], basis @ u[:, :rank] * root


def _factors(parts: Sequence[Part], targets: list[Tensor], share: bool, solve: Solve) -> list[tuple[Tensor, Tensor]]:
    ranks = {part.spec.low_rank for part in parts}
    if share and len(ranks) == 1 and all(part.branches == 1 for part in parts):
        a, b = solve(torch.cat(targets), ranks.pop())
        pairs = [(a, own) for own in b.split([len(target) for target in targets])]
    else:
        pairs = [_own(part, target, solve) for part, target in zip(parts, targets, strict=True)]
    return [
        decoded_factors(encoded_factors(a, b.contiguous(), part.spec.factor_bits, part.branches), part.branches)
        for part, (a, b) in zip(parts, pairs, strict=True)
    ]


def _own(part: Part, target: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
    found = [solve(block, part.spec.low_rank) for block in target.chunk(part.branches)]
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


def _error(part: Part, weight: Tensor, factors: tuple[Tensor, Tensor], decoded: Tensor, inputs: Tensor | None) -> float:
    branch = expand_low_rank(*factors, part.branches)
    if inputs is None:
        return float((weight - branch - decoded).square().sum())
    read = inputs if part.spec.activation is None else restore_tokens(*quantize_tokens(inputs, part.spec.activation))
    return float((F.linear(inputs, weight - branch) - F.linear(read, decoded)).square().sum())
