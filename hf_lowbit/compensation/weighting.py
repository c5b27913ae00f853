"""From what calibration remembers of a layer's inputs to the weighting that a metric stands for."""

from __future__ import annotations

from torch import Tensor

METRICS = {
    "identity": "the error of the weight (ZeroQuant-V2's LoRC, LQER, LoftQ); needs no data",
    "mean_abs": "inputs weighted by their mean magnitudes (L2QER)",
    "diag": "inputs weighted by their root mean squares (QERA-approx)",
    "full": "the error of the layer's output (QERA-exact, EoRA)",
}
_LEAST = 1e-4  # of a mean magnitude (L2QER)


def mean_abs_weighting(magnitude: Tensor) -> Tensor:
    """L2QER's S (arXiv 2402.02446): mean magnitudes over the geometric mean of the least and the largest of them.

    Args:
        magnitude: ``[..., channels]``, the largest over batches of the mean |x| over a batch's tokens.

    Returns:
        ``[..., channels]``.
    """
    clamped = magnitude.clamp(min=_LEAST)
    return clamped / (clamped.amin(-1, keepdim=True) * clamped.amax(-1, keepdim=True)).sqrt()


def diag_weighting(second_moment: Tensor) -> Tensor:
    """QERA-approx's S (arXiv 2410.06040): root mean squares.

    Args:
        second_moment: mean of x^2, ``[..., channels]``.
    """
    return second_moment.sqrt()
