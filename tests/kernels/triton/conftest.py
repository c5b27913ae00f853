"""Products are tested where Triton's kernels run: on a GPU, or in its interpreter (TRITON_INTERPRET=1)."""

from hf_lowbit.kernels import triton

collect_ignore = [] if triton.unavailable_because() is None else ["test_products.py"]
