"""Mixed precision within a budget of bits per weight: bits, and ranks of low-rank branches, for every layer."""

from hf_lowbit.search.blocks import BlockChoice, search_blocks
from hf_lowbit.search.program import METRICS, search, search_bits
from hf_lowbit.search.ranks import choose_ranks, on_batches
from hf_lowbit.search.result import GroupChoice, SearchResult

__all__ = [
    "METRICS",
    "BlockChoice",
    "GroupChoice",
    "SearchResult",
    "choose_ranks",
    "on_batches",
    "search",
    "search_bits",
    "search_blocks",
]
