"""The recipe of QuIP: every linear layer is made incoherent, then rounded with feedback; all at once for a block."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.calibration.block import UNREACHED, Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.second_order import as_read
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import PackedTensor, SpecError, WeightSpec
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.method import Recipe
from hf_lowbit.nn import Incoherence, PackedLinear
from hf_lowbit.nn.transforms.incoherence import SCALE_DTYPE
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.gptq import CholeskyError, GPTQResult, gptq
from hf_lowbit.rounding.ldlq import ldlq
from hf_lowbit.rounding.store import round_with, stack
from hf_lowbit.transforms.incoherence import balancing_scale, with_ridge
from hf_lowbit_quip.config import QuIPConfig


def make_recipe(config: QuIPConfig) -> Recipe:
    """What cannot be rotated gets GPTQ's rounding, with one scale for each row instead of one for all; noted."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        hessians = block.hessians()
        for key in block.matrices:
            statistic = hessians.get(key)
            if statistic is None:
                _round_to_nearest(block, key, f"{block.notes[key]}: rounded to nearest")
                continue
            if statistic.tokens == 0:
                _round_to_nearest(block, key, UNREACHED)
                continue
            try:
                result = _round(block, key, statistic, config)
            except CholeskyError as problem:
                _round_to_nearest(block, key, f"{problem}: rounded to nearest")
                continue
            if result.damping > config.damping:
                block.note(key, f"its Hessian needed damping={result.damping:g}")
            block.pack(key, result.packed)

    return Recipe(rounding=_nearest, calibrate=calibrate)


def _round(block: Block, key: str, statistic: Hessian, config: QuIPConfig) -> GPTQResult:
    matrix = block.matrices[key]
    problem = make_incoherent(matrix, statistic.matrix, block.seed)
    if problem is not None:
        block.notes[key.partition("[")[0]] = f"{problem}: not rotated, rounded as GPTQ does"  # once for all experts
        return gptq(matrix.weight, _by_rows(matrix.spec), statistic.matrix, damping=config.damping)
    return ldlq(
        matrix.weight,
        matrix.spec,
        with_ridge(as_read(matrix, statistic)),
        damping=config.damping,
        reach=config.range_factor,
        greedy_passes=config.greedy_passes,
    )


def make_incoherent(matrix: Matrix, hessian: Tensor, seed: int) -> str | None:
    """Give a layer that is not packed yet its transform; or say why it cannot have one."""
    layer = matrix.skeleton
    if not isinstance(layer, PackedLinear):
        return f"layers of kind {layer.kind!r} have no transforms"
    transform = Incoherence(seed)
    try:
        transform.companions(*matrix.weight.shape)
    except SpecError as problem:
        return str(problem)
    layer.set_transform(transform, {"scale": to_bits(balancing_scale(matrix.weight, hessian), SCALE_DTYPE)})
    return None


def _by_rows(spec: WeightSpec) -> WeightSpec:
    """One scale for a matrix is enough only where rotations have made its entries alike."""
    return replace(spec, group_size=None) if spec.group_size == "tensor" else spec


def _round_to_nearest(block: Block, key: str, reason: str) -> None:
    matrix = block.matrices[key]
    is_rotated = matrix.layer_spec.transform is not None
    block.notes[key] = reason
    block.pack(key, _nearest(matrix.weight, matrix.spec if is_rotated else _by_rows(matrix.spec)))


def _nearest(weight: Tensor, spec: WeightSpec) -> PackedTensor:
    """Without data, and of weights that an adapter was merged into: ranges are searched, rotated or not."""
    if weight.dim() == 3:
        return stack([_nearest(matrix, spec) for matrix in weight])
    return round_with(fit_clipped, weight, spec)
