"""Columns that are not rounded absorb the errors of those that are (QUIK, arXiv 2310.09259, section 3.2).

QUIK puts the columns that stay floats last in GPTQ's order: each error flows into the columns after it, and the floats,
which make none, end up with what is best for them. That can be said without an order. With E the floats, R the others
and D = (W - Q) of R, the best floats are W_E + D G with G = H_RE H_EE^-1, and what D costs then is tr(D S D^T) with the
Schur complement S = H_RR - G H_ER. GPTQ with S in place of H therefore chooses the codes of the longer sweep [ours: the
authors permute the columns and sweep over all].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowbit.rounding.feedback import CholeskyError


class Absorption(NamedTuple):
    """What the floats make of the errors of the other columns.

    Attributes:
        kept: index of the floats, ``[f]``.
        hessian: ``[columns, columns]``, S in its place and zero for the floats, as if no input came there: a rounding
            with it leaves them out of its grids, and their codes stand for zero.
        gain: ``[columns, f]``, G in its place and zero for the floats.
    """

    kept: Tensor
    hessian: Tensor
    gain: Tensor

    def absorbed(self, weight: Tensor, rounded: Tensor) -> Tensor:
        """The float columns ``[rows, f]`` of a weight, with the errors of its rounded other columns made good."""
        return weight[:, self.kept] + (weight - rounded) @ self.gain.to(weight.dtype)


def absorption(hessian: Tensor, index: Tensor, damping: float) -> Absorption:
    """Solve for the floats.

    Args:
        hessian: ``[columns, columns]``, mean of x x^T over tokens.
        index: columns that stay floats, ``[f]``, each once.
        damping: share of the floats' mean diagonal added to their diagonal. A rounding adds that of the others': the
            power of the outliers, far above theirs, does not damp them [ours; the authors add one share of the mean of
            all].

    Raises:
        CholeskyError: the floats' block is not positive definite, damped as it is.
    """
    index = index.to(hessian.device)
    own, across = hessian[index][:, index].double(), hessian[index].double()
    mean = own.diagonal().mean()
    own.diagonal().add_(damping * mean if bool(mean > 0) else 1.0)
    lower, failed = torch.linalg.cholesky_ex(own)
    if failed:
        raise CholeskyError(f"the Hessian of its exact columns is not positive definite with damping={damping:g}")
    gain = torch.cholesky_solve(across, lower).t().to(hessian.dtype)
    gain[index] = 0
    rest = hessian - gain @ hessian[index]
    rest[index], rest[:, index] = 0, 0
    rest.diagonal().clamp_(min=0)  # rounding of what the floats make good entirely
    return Absorption(index, rest, gain)
