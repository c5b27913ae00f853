"""Launching the Triton kernels of products: grids and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowbit.kernels.triton import blocks
from hf_lowbit.kernels.triton.compiled import ALIGNMENT, Bound, Found, Plan, Step, addresses, launch
from hf_lowbit.kernels.triton.decode import decode_rows, rescale
from hf_lowbit.kernels.triton.device import interpreted
from hf_lowbit.kernels.triton.digits import DIGITS, multiply_digits, to_digits
from hf_lowbit.kernels.triton.fused import fused
from hf_lowbit.kernels.triton.matrix import Matrix, Tiling
from hf_lowbit.kernels.triton.quantize import quantize
from hf_lowbit.kernels.triton.unpack import codes_of_unit, octets, words_of_unit
from hf_lowbit.kernels.triton.wide import add_parts, arrange, wide

_SCALES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
_ARRANGED = 256  # chunks of a block
MOST_TOGETHER = 3  # matrices of one launch


def launch_fused(x: Tensor, matrices: Sequence[Matrix], x_scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """x ``[tokens, columns]`` of a 16-bit type to ``[tokens, rows]`` in ``dtype``, times ``x_scale`` ``[tokens]``.

    Of up to MOST_TOGETHER matrices that are :func:`alike`, in one launch.
    """
    return _launch_fused(x, matrices, x_scale, dtype)[0]


def alike(x: Tensor, matrix: Matrix) -> tuple[Any, ...]:
    """What matrices have in common that are multiplied in one launch: their blocks, too, so that no bit changes."""
    assert matrix.layout.tiling is not None
    shape = _fused_block(x.shape[0], matrix, matrix.layout.tiling)
    return matrix.layout, matrix.packed.scale.shape[0] < matrix.rows, *shape.values()


def bind_fused(x: Tensor, matrices: Sequence[Matrix]) -> Bound | None:
    """Launches for x, which it makes, of matrices that are :func:`alike`: MOST_TOGETHER in one.

    None in the interpreter.
    """
    steps: list[Step] = []
    kept: list[Tensor | None] = []
    for first in range(0, len(matrices), MOST_TOGETHER):
        some = matrices[first : first + MOST_TOGETHER]
        _, found, given = _launch_fused(x, some, None, x.dtype)
        if found is None:
            return None
        absent = [None] * (MOST_TOGETHER - len(some))
        found = found._replace(others=(*absent, *found.others))  # outputs come last of the tensors
        steps.append(Step(found, addresses(given[1:]), slice(first, first + len(some))))
        kept += given[-3:-1]
    return Bound(tuple(steps), tuple(kept))


def _launch_fused(
    x: Tensor, matrices: Sequence[Matrix], x_scale: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Found | None, tuple[Tensor | None, ...]]:
    """Outputs, the launch, and all its tensors before the outputs."""
    matrix, absent = matrices[0], [None] * (MOST_TOGETHER - len(matrices))
    layout = matrix.layout
    tiling = layout.tiling if x_scale is None else layout.exact_tiling
    assert tiling is not None
    x = aligned(x)
    results = [torch.empty(x.shape[0], one.rows, dtype=dtype, device=x.device) for one in matrices]
    instructions = layout.scaled if tiling.scales_weights else layout.unpacking.instructions
    stored = [(one.packed.weight, one.packed.scale, one.packed.zero_point) for one in matrices]
    given = (
        x, *itertools.chain(*stored), *absent * 3, None if instructions else matrix.table(x.dtype),
        matrix.table(torch.float32) if layout.zero_kind == 2 and layout.offset is None else None, x_scale,
    )  # fmt: skip
    key = (layout, matrix.packed.scale.shape[0], x.shape[0], *[one.rows for one in matrices])
    found = launch(
        fused, key, (*given, *results, *absent),
        lambda: _fused_plan(x, matrices, tiling, instructions, x_scale is not None), x,
    )  # fmt: skip
    return results, found, given


def _fused_plan(
    x: Tensor, matrices: Sequence[Matrix], tiling: Tiling, instructions: str | None, has_x_scale: bool
) -> Plan:
    matrix = matrices[0]
    layout, packed, unpacking = matrix.layout, matrix.packed, matrix.layout.unpacking
    tokens, bits, rows = x.shape[0], packed.spec.bits, [one.rows for one in matrices]
    shape = _fused_block(tokens, matrix, tiling)
    count, words, groups = codes_of_unit(bits), packed.weight.shape[1], packed.scale.shape[1]
    units, scaled = matrix.columns // count, tiling.parts if tiling.scales_weights else 0
    numbers = (
        tokens, *rows, *[0] * (MOST_TOGETHER - len(rows)), units, words, groups, _zero_words(matrix),
        0 if packed.scale.shape[0] < matrix.rows else groups,
        matrix.columns // min(4, count), unpacking.step, unpacking.offset,
    )  # fmt: skip
    constants = {
        "BITS": bits, "COUNT": count, "WORDS": words_of_unit(bits), "INSTRUCTIONS": instructions,
        "OPERANDS": _operands(bits, scaled > 0), "OFFSET": layout.offset, "ZERO": layout.zero_kind,
        "SCALE": _SCALES[packed.spec.scale_dtype], "X_SCALE": has_x_scale,
        "SUMS": not scaled and (unpacking.offset != 0 or layout.zero_kind != 0),
        "GROUP_SLICES": 0 if scaled else tiling.group_slices, "PARTS": 1 if scaled else tiling.parts, "SCALED": scaled,
        "WHOLE": units % (shape["SLICES"] * tiling.units) == 0, "SINGLE": tokens == 1, "UNITS": tiling.units,
        **shape, **_dependence(x.device),
    }  # fmt: skip
    if not _overlaps(x.device) or shape["PREFETCHED"] * shape["SLICES"] * tiling.units > units:
        constants["PREFETCHED"] = 0
    every = sum(triton.cdiv(height, shape["ROWS"]) for height in rows)
    return Plan((every, triton.cdiv(tokens, shape["TOKENS"]), 1), numbers, constants)


def _fused_block(tokens: int, matrix: Matrix, tiling: Tiling) -> dict[str, int]:
    bits, layout = matrix.packed.spec.bits, matrix.layout
    plain = layout.offset is not None and layout.zero_kind == 0
    return blocks.fused_block(tokens, matrix.rows, bits, tiling, matrix.columns // codes_of_unit(bits), plain)


def launch_digits(x: Tensor, matrix: Matrix, recorded: bool) -> Tensor:
    """x ``[tokens, columns]`` of a 16-bit type, one or two tokens, to ``[tokens, rows]`` in its type.

    Args:
        recorded: in a CUDA graph: weights were written before it begins, and need not wait for any of its kernels.
    """
    return _launch_digits(x, matrix, recorded)[0]


def bind_digits(x: Tensor, matrices: Sequence[Matrix], recorded: bool) -> Bound | None:
    """The launches of :func:`launch_digits` for x, which it makes, the digits' once; None in the interpreter."""
    first, between, steps = None, 0, []
    for place, matrix in enumerate(matrices):
        _, first, second, between = _launch_digits(x, matrix, recorded)
        if first is None or second is None:
            return None
        stored = addresses((matrix.packed.weight, matrix.packed.scale))
        steps.append(Step(second, stored, slice(place, place + 1)))
    return Bound(tuple(steps), (), first, between)


def _launch_digits(x: Tensor, matrix: Matrix, recorded: bool) -> tuple[Tensor, Found | None, Found | None, int]:
    layout, packed, bits = matrix.layout, matrix.packed, matrix.packed.spec.bits
    x = aligned(x)
    (tokens, columns), rows, pieces = x.shape, matrix.rows, 8 // bits
    row, groups, slice = columns // pieces, packed.scale.shape[1], blocks.SLICE_BYTES
    between = tokens * (DIGITS.value * columns + torch.float32.itemsize)
    digits = torch.empty(between, dtype=torch.int8, device=x.device)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    early = recorded and _overlaps(x.device)

    def plan_digits() -> Plan:
        part = triton.next_power_of_2(triton.cdiv(row, blocks.DIGIT_PARTS))
        constants = {
            "PIECES": pieces, "ALL": triton.next_power_of_2(columns), "PART": part, "TOKENS": tokens,
            "EARLY": early, "num_warps": blocks.DIGIT_WARPS, **_dependence(x.device),
        }  # fmt: skip
        return Plan((tokens, triton.cdiv(row, part), 1), (columns,), constants)

    def plan_product() -> Plan:
        shape = blocks.digits_block(rows)
        operands = ",".join(["=r"] * pieces + ["r"])
        constants = {
            "ROW": row, "GROUPS": groups, "BITS": bits, "HOW": None if interpreted() else (octets(bits), operands),
            "SCALE": _SCALES[packed.spec.scale_dtype],
            "GROUP_SLICES": row // groups // slice, "TOKENS": tokens, "UNITS": slice, **shape, **_dependence(x.device),
        }  # fmt: skip
        return Plan((rows // shape["ROWS"], 1, 1), (rows,), constants)

    key = (layout, *out.shape)
    first = launch(to_digits, (*key, early), (x, digits), plan_digits, x)
    second = launch(multiply_digits, key, (digits, packed.weight, packed.scale, out), plan_product, x)
    return out, first, second, between


def launch_wide(x: Tensor, matrix: Matrix) -> Tensor:
    """x ``[tokens, columns]`` of the type of the matrix's scales to ``[tokens, rows]`` in it."""
    layout, packed, bits = matrix.layout, matrix.packed, matrix.packed.spec.bits
    x = aligned(x)
    tokens, rows, count, tiling = x.shape[0], matrix.rows, codes_of_unit(bits), layout.tiling
    assert tiling is not None
    chunks, key = matrix.columns // count, (layout, tokens, rows)
    arranged = torch.empty(count, tokens, chunks, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    parts = blocks.wide_parts(tokens, rows, bits, tiling.units, chunks // tiling.units)
    sums = torch.empty(parts, tokens, rows, device=x.device) if parts > 1 else out

    def plan_arrange() -> Plan:
        constants = {"COUNT": count, "BLOCK": _ARRANGED, **_dependence(x.device)}
        return Plan((tokens, triton.cdiv(chunks, _ARRANGED), 1), (tokens, chunks), constants)

    def plan_wide() -> Plan:
        of_block = blocks.wide_tokens(tokens)
        constants = {
            "BITS": bits, "COUNT": count, "INSTRUCTIONS": layout.scaled, "OPERANDS": _operands(bits, True),
            "GROUP_SLICES": tiling.group_slices, "ROWS": blocks.WIDE_ROWS, "CHUNKS": tiling.units, "TOKENS": of_block,
            "PARTS": parts, "STAGES": blocks.WIDE_STAGES, "num_warps": blocks.WIDE_WARPS, **_dependence(x.device),
        }  # fmt: skip
        numbers = (tokens, rows, chunks, packed.weight.shape[1], packed.scale.shape[1])
        return Plan((triton.cdiv(rows, blocks.WIDE_ROWS), triton.cdiv(tokens, of_block), parts), numbers, constants)

    def plan_sums() -> Plan:
        constants = {"PARTS": parts, "BLOCK": blocks.ADDED, **_dependence(x.device)}
        return Plan((triton.cdiv(tokens * rows, blocks.ADDED), 1, 1), (tokens * rows,), constants)

    table = None if layout.scaled else matrix.table(x.dtype)
    launch(arrange, key, (x, arranged), plan_arrange, x)
    launch(wide, (*key, parts), (arranged, packed.weight, packed.scale, table, sums), plan_wide, x)
    if parts > 1:
        launch(add_parts, (tokens * rows, parts), (sums, out), plan_sums, x)
    return out


def launch_decode(
    matrix: Matrix, first: int, index: Tensor | None, out: Tensor, *, table: Tensor | None = None, scaled: bool = True
) -> None:
    """Decoded rows from ``first`` on, or those of ``index``, into ``out`` ``[n, columns]``.

    Args:
        table: float32 values to take instead of the format's.
        scaled: multiply by scales, less zero points; False leaves values of the table.
    """
    layout, packed, spec = matrix.layout, matrix.packed, matrix.packed.spec
    offset = layout.offset if table is None else None

    def plan() -> Plan:
        rows, groups, base3 = out.shape[0], packed.scale.shape[1], spec.packing == "base3"
        codes = 5 if base3 else 32 // spec.bits if 32 % spec.bits == 0 else 8 if spec.bits == 3 else 4
        units = triton.next_power_of_2(max(1, min(blocks.DECODED_CODES, matrix.columns) // codes))
        numbers = (
            first, rows, matrix.columns, packed.weight.shape[1], groups, _zero_words(matrix),
            int(packed.scale.shape[0] < matrix.rows),
        )  # fmt: skip
        constants = {
            "BITS": spec.bits, "BASE3": base3, "OFFSET": offset, "ZERO": layout.zero_kind,
            "SCALE": _SCALES[spec.scale_dtype], "SCALED": scaled, "INDEXED": index is not None,
            "GROUP": matrix.columns // groups if groups > 1 else 0, "WHOLE": matrix.columns // groups % codes == 0,
            "ROWS": blocks.DECODED_ROWS, "UNITS": units,
        }  # fmt: skip
        grid = (triton.cdiv(rows, blocks.DECODED_ROWS), triton.cdiv(matrix.columns, units * codes), 1)
        return Plan(grid, numbers, constants)

    values = matrix.table(torch.float32) if table is None and offset is None else table
    key = (layout, first, out.shape[0], matrix.rows, packed.scale.shape[0], table is None, scaled)
    launch(decode_rows, key, (packed.weight, packed.scale, packed.zero_point, values, index, out), plan, out)


def launch_quantize(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """int8 codes of x ``[m, columns]`` and float32 scales ``[m, 1]``; the largest magnitude gets the code ``limit``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], 1, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    constants = {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}
    arguments = (x, codes, scale, x.shape[1], x.stride(0), float(limit))
    launch(quantize, (*x.shape,), arguments, lambda: Plan((x.shape[0], 1, 1), (), constants), x)
    return codes, scale


def launch_rescale(sums: Tensor, token_scale: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 sums ``[m, rows]`` times float32 scales ``[m, 1]`` and ``[rows, 1]``, in ``dtype``, in one pass."""
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    grid = (sums.shape[0], triton.cdiv(sums.shape[1], blocks.RESCALED), 1)
    arguments = (sums, token_scale.contiguous(), row_scale.contiguous(), out)
    launch(rescale, grid, arguments, lambda: Plan(grid, (sums.shape[1],), {"BLOCK": blocks.RESCALED}), out)
    return out


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and where vectors of it can be loaded."""
    return x.clone(memory_format=torch.contiguous_format) if not x.is_contiguous() or x.data_ptr() % ALIGNMENT else x


def _zero_words(matrix: Matrix) -> int:
    return 0 if matrix.packed.zero_point is None else matrix.packed.zero_point.shape[1]


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead of it ends."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def _operands(bits: int, scaled: bool) -> str:
    return ",".join(["=r"] * codes_of_unit(bits) + ["r"] * ((2 * words_of_unit(bits) or 1) + scaled))


def _dependence(device: torch.device) -> dict[str, Any]:
    return {"DEPENDENT": True, "launch_pdl": True} if _overlaps(device) else {"DEPENDENT": False}
