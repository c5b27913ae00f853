"""Parts of benchmarks/finetune.py."""
