"""Sines and cosines in a compiled graph: once each, with the results of eager code."""

from __future__ import annotations

import torch
from torch._inductor.utils import run_and_get_code

from hf_lowbit.kernels.angles import ComputeAnglesOnce


def rotated_twice(angles: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """As the layers of a model do, with a sum in between that keeps their loops apart."""
    cosines, sines = angles.cos() * 0.5, angles.sin() * 0.5
    first = first * cosines + first.flip(-1) * sines
    second = second + first.sum(-1, keepdim=True)
    return [first, second * cosines + second.flip(-1) * sines]


def test_are_computed_once() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 64, generator=generator) for _ in range(3)]
    for with_pass in (False, True):
        options = {"post_grad_custom_pre_pass": ComputeAnglesOnce()} if with_pass else {}
        torch.compiler.reset()
        compiled = torch.compile(rotated_twice, fullgraph=True, options=options)
        results, code = run_and_get_code(compiled, *inputs)
        for result, expected in zip(results, rotated_twice(*inputs), strict=True):
            torch.testing.assert_close(result, expected)
        counts = [sum(source.count(f"{name}()") for source in code) for name in ("sin", "cos")]
        repeats = min(counts)
        if not with_pass:
            without = repeats
    assert repeats * 2 <= without
