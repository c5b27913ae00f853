"""Launching the kernel for many tokens: whole tiles for every multiprocessor, parts of those that are left."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_lowbit.kernels.triton import dense_blocks
from hf_lowbit.kernels.triton.compiled import Plan, launch
from hf_lowbit.kernels.triton.dense import PIECE, SIDE, dense
from hf_lowbit.kernels.triton.dense_codes import WORDS
from hf_lowbit.kernels.triton.dense_sums import add_tiles
from hf_lowbit.kernels.triton.launch import aligned
from hf_lowbit.kernels.triton.matrix import Matrix

_SQUARE = 64  # of a tile, of one program that adds sums
# Swizzled, as the tensor cores read it, and so that threads read and write without conflicts of banks.
_HALVES = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_SHORT_HALVES = NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
_CODES = NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=32, rank=2)
_SUMS = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)

_refused: list[CompilationError] = []


def launch_dense(x: Tensor, matrix: Matrix) -> Tensor | None:
    """x ``[tokens, columns]`` of the type of the matrix's scales to ``[tokens, rows]`` in it.

    None where this version of Triton does not compile the kernel: Gluon's names change between them.
    """
    if _refused:
        return None
    x, packed, rows = aligned(x), matrix.packed, matrix.rows
    tokens, columns = x.shape
    blocks, groups = processors(x.device), packed.scale.shape[1]
    shape, (whole, rest, parts) = dense_blocks.choose(tokens, rows, columns, blocks)
    units, key = whole + rest * parts, (matrix.layout, tokens, rows, shape.tokens, parts)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    down, across = (shape.rows, shape.tokens) if shape.flip else (shape.tokens, shape.rows)
    sums = torch.empty(parts * rest * down, across, device=x.device) if parts > 1 else None
    given = (
        _described(x, [shape.tokens, dense_blocks.STEP], _HALVES),
        _described(packed.weight, [shape.rows, WORDS.value], _CODES),
        packed.scale,
        _described(out, [PIECE.value, SIDE.value], _HALVES) if shape.flip
        else _described(out, [SIDE.value, PIECE.value], _SHORT_HALVES),
        None if sums is None else _described(sums, [SIDE.value, PIECE.value], _SUMS),
    )  # fmt: skip

    def plan_dense() -> Plan:
        group = columns // groups // dense_blocks.STEP if groups > 1 else 0
        numbers = (tokens, rows, columns, groups, units, whole, max(1, rest), parts)
        constants = {
            "ROWS": shape.rows, "TOKENS": shape.tokens, "STAGES": shape.stages, "AHEAD": shape.ahead,
            "GROUP_STEPS": group, "PRODUCERS": shape.producers, "CONSUMERS": shape.consumers, "FLIP": shape.flip,
            "MULTIPLYING": shape.multiplying, "PRODUCING": shape.producing, "num_warps": 4, "launch_pdl": True,
        }  # fmt: skip
        return Plan((min(units, blocks), 1, 1), numbers, constants)

    def plan_sums() -> Plan:
        numbers = (tokens, rows, whole, rest, parts, triton.cdiv(tokens, shape.tokens))
        constants = {
            "ROWS": shape.rows, "TOKENS": shape.tokens, "FLIP": shape.flip, "BLOCK": _SQUARE, "DEPENDENT": True,
            "launch_pdl": True,
        }  # fmt: skip
        return Plan((rest, shape.rows * shape.tokens // _SQUARE**2, 1), numbers, constants)

    try:
        launch(dense, key, given, plan_dense, x)
    except CompilationError as error:
        _refused.append(error)
        return None
    if sums is not None:
        launch(add_tiles, key, (sums, out), plan_sums, x)
    return out


def _described(tensor: Tensor, block: list[int], layout: NVMMASharedLayout) -> TensorDescriptor:
    """What the copy engine is given for a contiguous matrix, aligned to 16 bytes as its rows are.

    It is made without the checks of its constructor, which take longer than a launch.
    """
    described: Any = object.__new__(TensorDescriptor)
    described.base, described.shape, described.block_shape = tensor, list(tensor.shape), block
    described.strides, described.layout, described.padding = [tensor.shape[1], 1], layout, "zero"
    return described


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: so many blocks."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
