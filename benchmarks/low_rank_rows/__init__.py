"""Parts of benchmarks/low_rank.py."""
