"""Parts of benchmarks/quality_diffusion.py."""
