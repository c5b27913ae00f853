"""Parts of a packed layer's weight that stay exact beside the codes, one file for each kind."""

from hf_lowbit.nn.exact.base import EXACT_KINDS, ExactSpec, register_exact
from hf_lowbit.nn.exact.columns import ExactColumns, keep_columns
from hf_lowbit.nn.exact.sparse import ExactSparse, keep_weights

__all__ = ["EXACT_KINDS", "ExactColumns", "ExactSparse", "ExactSpec", "keep_columns", "keep_weights", "register_exact"]
