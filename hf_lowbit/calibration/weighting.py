"""What a metric of low-rank compensation needs to know of a layer's inputs, and the weighting it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.calibration.statistics import BatchMagnitude, Hessian, SecondMoment, Statistic
from hf_lowbit.compensation import diag_weighting, mean_abs_weighting

_STATISTICS: dict[str, Any] = {"mean_abs": BatchMagnitude, "diag": SecondMoment, "full": Hessian}


def statistic_for(metric: str) -> Callable[[int, torch.device], Statistic]:
    """Channels, device -> an empty statistic, to be collected for a metric of
    :data:`hf_lowbit.compensation.METRICS` other than "identity".
    """
    make: Callable[[int, torch.device], Statistic] = _STATISTICS[metric]
    return make


def weighting_of(statistic: Statistic) -> Tensor | None:
    """The weighting for :func:`hf_lowbit.compensation.low_rank_factors`, ``[channels]`` or ``[channels, channels]``.

    None, the metric "identity", where no token was seen.
    """
    if statistic.tokens == 0:
        return None
    if isinstance(statistic, Hessian):
        return statistic.matrix
    if isinstance(statistic, SecondMoment):
        return diag_weighting(statistic.mean)
    if isinstance(statistic, BatchMagnitude):
        return mean_abs_weighting(statistic.maximum)
    raise TypeError(f"a {type(statistic).__name__} weighs no inputs")
