"""GPTQ on a GPU: the parts of `benchmarks/calibration_gpu.py`.

`models` makes Llamas of random weights, `block` times a block by its `parts`, `resuming` runs whole models in several
calls and watches the host's `memory`, `parallel` sets two processes against one.
"""
