"""Where decoding in registers stops beating decoded tiles: the numbers behind hf_lowbit/kernels/routes.py.

python -m benchmarks.crossovers
"""

from __future__ import annotations

import torch

from benchmarks.speed_cpu import random_packed, seconds
from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.tiles import tiled_product

SPECS = {
    "int3": WeightSpec(bits=3, group_size=64),
    "int4": WeightSpec(bits=4, group_size=64),
    "int8": WeightSpec(bits=8),
}


def compare(x: torch.Tensor, matrix: cpu.Matrix) -> str:
    """Milliseconds both ways."""
    registers = 1e3 * seconds(lambda _: cpu.linear(x, [matrix]), 5)
    tiles = 1e3 * seconds(lambda _: tiled_product(x, matrix), 5)
    return f"registers {registers:7.2f} ms, tiles {tiles:7.2f} ms"


def main() -> None:
    torch.set_num_threads(2)
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
