"""The backend "humming" with its package, on a GPU: the product is ours."""

from __future__ import annotations

import torch

from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import humming, kernel_of, packed_linear
from hf_lowbit.rounding import round_to_nearest

SPEC = WeightSpec(bits=4, group_size=128)


def test_it_computes_what_ours_does() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).cuda()
    packed = round_to_nearest(weight, SPEC)
    assert kernel_of(packed, None, "humming") == humming.told("triton")
    for tokens in (1, 17, 200):
        x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(tokens)).bfloat16().cuda()
        expected = packed_linear(x, packed, backend="reference")
        torch.testing.assert_close(packed_linear(x, packed, backend="humming"), expected, rtol=0.02, atol=0.5)
    assert packed.weight in humming._kept
