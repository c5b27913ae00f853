"""What is tested where: kernels on a GPU or in Triton's interpreter (TRITON_INTERPRET=1), refusals where neither is."""

import torch

from hf_lowbit.kernels import humming, triton
from hf_lowbit.kernels.triton.products import has_gluon

if triton.unavailable_because() is not None:
    collect_ignore = [
        "test_products.py",
        "test_digits.py",
        "test_together.py",
        "test_columns.py",
        "test_scan.py",
        "test_convolution.py",
        "test_gpu.py",
        "test_graphs.py",
        "test_decoding.py",
    ]
else:
    collect_ignore = [
        "test_refused.py",
        *(["test_gpu.py", "test_graphs.py", "test_decoding.py"] if triton.interpreted() else []),
    ]
if (
    not torch.cuda.is_available()
    or triton.interpreted()
    or torch.cuda.get_device_capability()[0] != 9
    or not has_gluon()
):
    collect_ignore.append("test_dense.py")
if humming.unavailable_because() is not None:
    collect_ignore.append("test_humming.py")
