"""What freed tensors leave behind is there for the next ones."""

from __future__ import annotations

import os
import subprocess
import sys

PAGES_OF_A_LAYER = 4 * (2 << 20) // 4096
PROGRAM = """
import resource

import torch

from hf_lowbit.kernels.cpu.library import load

def layer():
    return [torch.ones(1 << 19) for _ in range(4)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

assert load() is not None
layer()
before = faults()
for _ in range(50):
    layer()
print(faults() - before)
"""


def test_freed_memory_is_used_again_without_new_pages() -> None:
    """Without the library, or before it keeps memory, mostly all pages of all fifty layers are new ones."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
    )
    assert int(result.stdout) < 5 * PAGES_OF_A_LAYER
