"""Where decoding in registers stops beating decoded tiles, for matrices and convolutions: behind kernels/routes.py.

python -m benchmarks.crossovers
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import hf_lowbit
from benchmarks.speed_cpu import microseconds, random_packed
from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.tiles import tiled_product
from hf_lowbit_rtn import RTNConfig

SPECS = {
    "int3": WeightSpec(bits=3, group_size=64),
    "int4": WeightSpec(bits=4, group_size=64),
    "int8": WeightSpec(bits=8),
}


def compare(x: torch.Tensor, matrix: cpu.Matrix) -> str:
    """Milliseconds both ways."""
    return milliseconds({"registers": lambda _: cpu.linear(x, [matrix]), "tiles": lambda _: tiled_product(x, matrix)})


def compare_convolution(channels: int, size: int) -> str:
    """Milliseconds of a 3x3 convolution of a picture: its kernel decoded, or its patches unfolded."""
    floats = torch.nn.Sequential(torch.nn.Conv2d(channels, channels, 3))
    packed = hf_lowbit.quantize(floats, RTNConfig(bits=4, group_size=32))[0]
    x = torch.randn(1, channels, size + 2, size + 2)
    with torch.no_grad():
        return milliseconds(
            {
                "decoded": lambda _: packed._convolve_decoded(x),
                "unfolded": lambda _: packed._convolve_patches(x, (size, size)),
            }
        )


def milliseconds(calls: dict[str, Callable[[int], Any]]) -> str:
    """Of ways that take turns."""
    times = microseconds(calls, dict.fromkeys(calls, 1), blocks=5)
    return ", ".join(f"{name} {1e-3 * time:7.2f} ms" for name, time in times.items())


def main() -> None:
    torch.set_num_threads(2)
    for channels, size in ((1280, 2), (1280, 4), (640, 5), (640, 6), (640, 8), (320, 16)):
        print(f"3x3, {channels} channels, {size * size} positions: {compare_convolution(channels, size)}")
    for rows, columns in ((4096, 4096), (1536, 576)):
        for name, spec in SPECS.items():
            packed = random_packed(rows, columns, spec)
            matrix = cpu.describe(packed)
            assert matrix is not None, cpu.unavailable_because()
            for dtype in (torch.float32, torch.bfloat16):
                for tokens in (4, 8, 16, 24, 32, 48, 64):
                    text = compare(torch.randn(tokens, columns).to(dtype), matrix)
                    print(f"{rows}x{columns} {name} {str(dtype).removeprefix('torch.')} {tokens:3} tokens: {text}")


if __name__ == "__main__":
    main()
