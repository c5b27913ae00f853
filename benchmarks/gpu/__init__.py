"""Speed on an NVIDIA GPU: the parts of `benchmarks/speed_gpu.py`.

`timing` is how products are timed, `kernels` measures ours, `peers` those of other libraries, `models` whole models;
`table` and `picture` show them.
"""
