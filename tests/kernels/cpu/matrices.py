"""Packed matrices of every format, made of random codes: the kernels must read whatever lies there."""

from __future__ import annotations

from typing import Any

import torch

from hf_lowbit.formats import PackedTensor, WeightSpec, pack_codes
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.formats.spec import SCALE_DTYPES

FORMATS: dict[str, dict[str, Any]] = {
    **{f"int{bits}": {"format": "int", "bits": bits} for bits in range(1, 9)},
    **{f"int{bits}-zero": {"format": "int", "bits": bits, "symmetric": False} for bits in range(2, 9)},
    **{
        f"int{bits}-real-zero": {"format": "int", "bits": bits, "symmetric": False, "real_zero_point": True}
        for bits in (2, 3, 4, 8)
    },
    **{
        name: {"format": name, "bits": 1 + int(name[4]) + int(name[6])}
        for name in ("fp_e2m1", "fp_e1m2", "fp_e2m2", "fp_e3m2", "fp_e2m3", "fp_e4m3", "fp_e5m2")
    },
    "int4-zero-float16": {"format": "int", "bits": 4, "symmetric": False, "scale_dtype": "float16"},
    "nf3-zero-float32": {"format": "nf", "bits": 3, "symmetric": False, "scale_dtype": "float32"},
    "float8_e4m3fn": {"format": "float8_e4m3fn", "bits": 8},
    "float8_e5m2": {"format": "float8_e5m2", "bits": 8},
    "nf4": {"format": "nf", "bits": 4},
    "nf4-zero": {"format": "nf", "bits": 4, "symmetric": False},
    "nf3": {"format": "nf", "bits": 3},
    "ternary": {"format": "ternary", "bits": 2},
    "ternary-base3": {"format": "ternary", "bits": 2, "packing": "base3"},
    "power5": {"format": "power", "bits": 5, "exponent": 0.5},
    "power8": {"format": "power", "bits": 8, "exponent": 0.5},
    "fitted3": {"format": "codebook", "bits": 3},
    "fitted7": {"format": "codebook", "bits": 7},
}


def random_packed(rows: int, columns: int, **fields: Any) -> PackedTensor:
    """Codes, scales and zero points at random, always the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    spec = WeightSpec(**fields)
    table = None
    if spec.has_fitted_table:
        table = torch.randn(2**spec.bits, generator=generator).sort().values
        usable = torch.arange(len(table))
    else:
        usable = torch.arange(2**spec.bits)[torch.isfinite(spec.number_format.table)]
        usable = usable[usable < 3] if spec.format == "ternary" else usable
    codes = usable[torch.randint(len(usable), (rows, columns), generator=generator)].to(torch.uint8)
    shape = spec.companions((rows,), columns)["_scale"][0]
    scale = to_bits(torch.rand(shape, generator=generator) + 0.5, spec.scale_dtype)
    zero_point = None
    if spec.has_integer_zero_point:
        zero_codes = torch.randint(2**spec.bits, shape, generator=generator, dtype=torch.uint8)
        zero_point = pack_codes(zero_codes, spec.bits)
    elif not spec.symmetric:
        zero_point = to_bits(torch.rand(shape, generator=generator), spec.scale_dtype)
    assert spec.scale_dtype in SCALE_DTYPES
    return PackedTensor(
        pack_codes(codes, spec.bits, spec.packing),
        scale,
        spec,
        columns,
        zero_point,
        None if table is None else table.view(torch.int32),
    )
