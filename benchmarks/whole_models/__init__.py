"""Whole models on a CPU: the parts of `benchmarks/models_cpu.py`.

`variants` lists what is measured, `rounds` runs it in fresh processes, `summary` takes medians, `picture` draws them.
"""
