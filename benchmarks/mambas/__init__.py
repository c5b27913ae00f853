"""Parts of benchmarks/state_space.py."""
