"""What is tested where: some of it needs a GPU."""

import torch

if not torch.cuda.is_available():
    collect_ignore = ["test_gpu.py"]
