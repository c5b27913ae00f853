"""What benchmarks/scan.py compares, and how it is timed."""
