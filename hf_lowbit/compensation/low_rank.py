"""The low-rank matrices that repair what rounding lost: one solver for every metric.

min ||(W - Q(W) - B A) S||_F over B A of rank r, with S S^T = R, the weighting of the inputs. ZeroQuant-V2's LoRC
(arXiv 2303.08302) and LQER (2402.02446) have S = I; L2QER a diagonal S of mean magnitudes, QERA-approx (2410.06040) one
of root mean squares; QERA-exact and EoRA (2410.21271) the whole R = mean of x x^T, with which the error of the layer's
output is least.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # of eigenvalues of R over their mean: directions that no input has shown must stay solvable


def low_rank_factors(error: Tensor, rank: int, weighting: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation B A of a rounding error: exact at full rank, empty at rank 0.

    The truncated singular value decomposition U Sigma V^T of E S, brought back by S^-1 (QERA, EoRA). Its
    product is U_r U_r^T E, so that of a matrix with no more rows than columns the eigenvectors of E R E^T are all that
    is needed [ours]. Of others the columns are fewer: they need S^-1, and inputs of less than 1e-6 of the mean power
    count as if they had it. Float64; both factors of a rank have the same norm, so that neither overflows half
    precision.

    Args:
        error: float ``[rows, columns]``, or stacked ``[..., rows, columns]``.
        rank: 0 to min(rows, columns).
        weighting: None for the Frobenius norm; a diagonal S ``[columns]``; or R ``[columns, columns]``, symmetric. Of
            stacks also one each: ``[..., 1, columns]`` or ``[..., columns, columns]``. Its scale does not matter.

    Returns:
        float32 A ``[..., rank, columns]`` and B ``[..., rows, rank]``.

    Raises:
        ValueError: the rank exceeds the matrix, or a weighting of another width, or one that is not finite.
    """
    rows, columns = error.shape[-2:]
    if not 0 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} exceeds the smaller side of a {rows} x {columns} matrix")
    exact, weighting = error.double(), _checked(weighting, columns)
    if rank == 0:
        a, b = exact[..., :0, :], exact[..., :0]
    elif rows <= columns:
        b = _leading(times_moment(exact, weighting) @ exact.mT, rank)
        a = b.mT @ exact
    else:
        root, inverse = _roots(weighting, exact)
        weighted = _times(exact, root)
        right = _leading(weighted.mT @ weighted, rank)
        a, b = _times(right.mT, inverse), weighted @ right
    return _balanced(a, b)


def tail_energies(error: Tensor, weighting: Tensor | None = None) -> Tensor:
    """What each rank leaves of the weighted squared error: sum of sigma_i^2 over i > r (Eckart and Young).

    With R as weighting this is the mean squared error of the layer's output, summed over its rows; with None
    ||W - Q(W) - B A||^2. Unlike the factors it depends on the weighting's scale.

    Args:
        error, weighting: as for :func:`low_rank_factors`.

    Returns:
        float64 ``[..., min(rows, columns) + 1]``, from rank 0 to full rank, whose last is 0.
    """
    exact, weighting = error.double(), _checked(weighting, error.shape[-1])
    if exact.shape[-2] <= exact.shape[-1]:
        gram = times_moment(exact, weighting) @ exact.mT
    else:
        weighted = _times(exact, _roots(weighting, exact)[0])
        gram = weighted.mT @ weighted
    energies = torch.linalg.eigvalsh(gram).clamp(min=0)  # the smallest first
    tails = energies.cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[..., :1])], -1)


def weighted_error(error: Tensor, weighting: Tensor | None = None) -> Tensor:
    """tr(E R E^T), float64 ``[...]``: the squared error that :func:`low_rank_factors` minimises, without its floor."""
    exact = error.double()
    return (times_moment(exact, weighting) * exact).sum((-2, -1)).clamp(min=0)


def times_moment(matrix: Tensor, weighting: Tensor | None) -> Tensor:
    """M R for a float64 M ``[..., rows, columns]`` and the R = S S^T that a weighting stands for."""
    if weighting is None:
        return matrix
    weights = weighting.double()
    return matrix * weights.square() if is_diagonal(weights, matrix.shape[-1]) else matrix @ weights


def is_diagonal(weighting: Tensor, columns: int) -> bool:
    """Whether a weighting is the diagonal of S, and not R."""
    return weighting.dim() == 1 or weighting.shape[-2] != columns


def _checked(weighting: Tensor | None, columns: int) -> Tensor | None:
    """Of inputs that are all zero none remains."""
    if weighting is None:
        return None
    is_known = weighting.dim() == 1 or (weighting.dim() > 1 and weighting.shape[-2] in (1, columns))
    if not is_known or weighting.shape[-1] != columns:
        raise ValueError(f"a weighting {tuple(weighting.shape)} does not fit an error of {columns} columns")
    if not weighting.isfinite().all():
        raise ValueError("the weighting of a low-rank compensation holds NaN or infinite values")
    return weighting if weighting.any() else None


def _roots(weighting: Tensor | None, error: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """S and S^-1: None, rows for diagonal ones, or matrices Q Lambda^1/2 (EoRA)."""
    if weighting is None:
        return None, None
    if is_diagonal(weighting, error.shape[-1]):
        root = _floored(weighting.double().square()).sqrt()
        return root, 1 / root
    values, vectors = torch.linalg.eigh(weighting.double())
    root = _floored(values).sqrt().unsqueeze(-2)
    return vectors * root, (vectors / root).mT


def _floored(powers: Tensor) -> Tensor:
    mean = powers.mean(-1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(powers, FLOOR * mean), 1)


def _times(matrix: Tensor, root: Tensor | None) -> Tensor:
    if root is None:
        return matrix
    return matrix * root if is_diagonal(root, matrix.shape[-1]) else matrix @ root


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, the largest first, as columns."""
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank]


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled to ||a_i|| = ||b_i||, and float32."""
    norms = a.norm(dim=-1), b.norm(dim=-2)
    ratio = torch.where((norms[0] > 0) & (norms[1] > 0), norms[1] / norms[0], 0).sqrt()
    back = torch.where(ratio > 0, 1 / ratio, 0)
    return (a * ratio.unsqueeze(-1)).float(), (b * back.unsqueeze(-2)).float()
