"""Peak anonymous memory of forward and backward through one large packed layer, in the process that does it.

    MALLOC_MMAP_THRESHOLD_=1000000 python -m tests.memory.backward cpu

prints one JSON line. See :mod:`tests.memory.probe` for what is measured.
"""

from __future__ import annotations

import json
import sys

from tests.memory.probe import PeakSampler, anonymous_bytes

SIDE = 8192


def main(backend: str) -> None:
    """A layer of 8192 x 8192 weights in 4 bits, 64 tokens in bfloat16."""
    import torch

    from hf_lowbit.formats import PackedTensor, WeightSpec
    from hf_lowbit.kernels import packed_linear

    torch.set_num_threads(1)
    spec = WeightSpec("nf", 4, 64)
    shapes = spec.companions((SIDE,), SIDE)
    tensors = {suffix: torch.ones(shape, dtype=dtype) for suffix, (shape, dtype) in shapes.items()}
    packed = PackedTensor(tensors[""], tensors["_scale"], spec, SIDE)
    x = torch.randn(64, SIDE, dtype=torch.bfloat16, requires_grad=True)
    small = torch.randn(64, SIDE, dtype=torch.bfloat16, requires_grad=True)
    packed_linear(small, packed.rows(slice(0, 64)), backend=backend).sum().backward()  # what the first call costs
    y = packed_linear(x, packed, backend=backend)
    before = anonymous_bytes()
    with PeakSampler() as sampler:
        y.backward(torch.ones_like(y))
    print(json.dumps({"peak_bytes": sampler.peak - before, "dense_bytes": SIDE * SIDE * 2}))


if __name__ == "__main__":
    main(*sys.argv[1:])
