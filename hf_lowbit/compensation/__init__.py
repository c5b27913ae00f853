"""Low-rank compensation: solvers on tensors only. What rounds factors or weights stands in modules of its own, so that
configs, which name the metrics, import no rounding.
"""

from hf_lowbit.compensation.iterated import Alternation, alternate
from hf_lowbit.compensation.low_rank import low_rank_factors, tail_energies, weighted_error
from hf_lowbit.compensation.ranks import remaining_errors
from hf_lowbit.compensation.weighting import METRICS, diag_weighting, mean_abs_weighting

__all__ = [
    "METRICS",
    "Alternation",
    "alternate",
    "diag_weighting",
    "low_rank_factors",
    "mean_abs_weighting",
    "remaining_errors",
    "tail_energies",
    "weighted_error",
]
