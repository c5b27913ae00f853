"""Low-rank compensation: solvers on tensors only."""

from hf_lowbit.compensation.low_rank import low_rank_factors

__all__ = ["low_rank_factors"]
