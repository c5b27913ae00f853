"""Mixed precision within a budget of bits per weight: bits, and ranks of low-rank branches, for every layer."""

from hf_lowbit.search.program import METRICS, search, search_bits
from hf_lowbit.search.ranks import choose_ranks, on_batches
from hf_lowbit.search.result import GroupChoice, SearchResult

__all__ = ["METRICS", "GroupChoice", "SearchResult", "choose_ranks", "on_batches", "search", "search_bits"]
