"""What is tested where: kernels on a GPU or in Triton's interpreter (TRITON_INTERPRET=1), refusals where neither is."""

from hf_lowbit.kernels import triton

if triton.unavailable_because() is not None:
    collect_ignore = ["test_products.py", "test_gpu.py"]
else:
    collect_ignore = ["test_refused.py", *(["test_gpu.py"] if triton.interpreted() else [])]
