"""Packed products of ours, beside torch's bfloat16 product and what moving the bytes takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gpu.timing import calls, cold_count, microseconds, small_copy
from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec
from hf_lowbit.kernels import kernel_of, packed_linear

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096))  # of an 8B model; the last: gate and up together
OTHERS = 1  # so many of these for the rarer cases
TOKENS = (1, 4, 16, 64, 256, 2048)
_FLOAT_WEIGHTS = 5  # each larger than the cache, or nearly


def cases(others: bool = True) -> list[tuple[WeightSpec, ActivationSpec | None]]:
    """Weights and inputs: integers of 2, 3, 4 and 8 bits; with ``others`` more widths, formats and quantized inputs."""
    main: list[tuple[WeightSpec, ActivationSpec | None]] = [
        *((WeightSpec(bits=4, group_size=group), None) for group in (128, 64, None)),
        (WeightSpec(bits=4, group_size=128, symmetric=False), None),
        *((WeightSpec(bits=bits, group_size=group), None) for bits, group in ((2, 128), (3, 128), (8, None))),
    ]
    eight = WeightSpec(format="float8_e4m3fn", bits=8)
    rest: list[tuple[WeightSpec, ActivationSpec | None]] = [
        *((WeightSpec(bits=bits, group_size=128), None) for bits in (1, 6)),
        *((WeightSpec(format=name, bits=4, group_size=64), None) for name in ("nf", "fp_e2m1")),
        (eight, None),
        *((WeightSpec(bits=bits), ActivationSpec("int", 8)) for bits in (4, 8)),
        (eight, ActivationSpec("float8_e4m3fn", 8)),
    ]
    return main + rest if others else main


def random_packed(rows: int, columns: int, spec: WeightSpec) -> PackedTensor:
    """Random codes: only where they lie matters."""
    stored = spec.companions((rows,), columns)
    parts = {
        name: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        for name, (shape, dtype) in stored.items()
        if dtype == torch.int32
    }
    scale = (0.01 * torch.rand(stored["_scale"][0], device="cuda") + 0.001).bfloat16().view(torch.int16)
    return PackedTensor(parts[""], scale, spec, columns, parts.get("_zero_point"))


def bytes_of(packed: PackedTensor) -> int:
    """Of codes, scales and zero points: what a token reads."""
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())


def time_floats(rows: int, columns: int, counts: Sequence[int] = TOKENS) -> dict[int, float]:
    """Tokens -> microseconds of torch's bfloat16 product."""
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(_FLOAT_WEIGHTS)]
    times = {}
    for tokens in counts:
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        times[tokens] = microseconds(lambda i, x=x: x @ weights[i % len(weights)].t(), 2 * len(weights))
    return times


def measure(
    rows: int,
    columns: int,
    spec: WeightSpec,
    activation: ActivationSpec | None,
    floats: Mapping[int, float],
    bandwidth: float,
) -> Iterator[dict[str, Any]]:
    """A row per number of tokens.

    "copy_us" is what moving the weight's bytes would take at the bandwidth of large copies, "small_copy_us" what a copy
    of as many bytes takes.
    """
    first = random_packed(rows, columns, spec)
    size = bytes_of(first)
    cold = [first, *(random_packed(rows, columns, spec) for _ in range(cold_count(size) - 1))]
    kernel, copied = kernel_of(first, activation, None), small_copy(size)
    for tokens, float_us in floats.items():
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        call = lambda i, x=x: packed_linear(x, cold[i % len(cold)], activation)  # noqa: E731
        us = microseconds(call, calls(len(cold), tokens))
        yield {
            "shape": [rows, columns], "weight": name_of(spec, activation), "tokens": tokens, "kernel": kernel, "us": us,
            "bfloat16_us": float_us, "copy_us": size / bandwidth, "small_copy_us": copied,
        }  # fmt: skip


def name_of(spec: WeightSpec, activation: ActivationSpec | None) -> str:
    """As rows are called."""
    name = f"int{spec.bits}" if spec.format == "int" else spec.format
    name += f" g{spec.group_size}" if spec.group_size else " row"
    name += "" if spec.symmetric else " zero"
    return name if activation is None else f"{name}, inputs {activation.format}{activation.bits}"
