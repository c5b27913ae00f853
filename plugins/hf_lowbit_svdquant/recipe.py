"""The recipe of SVDQuant: smooth every input, then decompose the matrices that read it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.matrices import as_read, why_without_inputs
from hf_lowbit.calibration.smoothing import SharedInput, parts_of, shared_inputs, smooth_input
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.compensation.absorption import absorb
from hf_lowbit.formats import PackedTensor
from hf_lowbit.method import Recipe
from hf_lowbit.rounding.gptq import CholeskyError, gptq
from hf_lowbit_svdquant.config import SVDQuantConfig


def make_recipe(config: SVDQuantConfig) -> Recipe:
    """All of a block is smoothed before any of it is packed: a folded scale changes the layer before."""

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        groups = shared_inputs(block)
        for group in groups:
            if group.is_linear:
                smooth_input(block, group, config.smooth_steps, config.share_branch)
            else:
                for key in group.keys:
                    kind = block.matrices[key].skeleton.kind
                    block.note(key, f"layers of kind {kind!r} are not smoothed: decomposed and rounded as they are")
        hessians = block.hessians() if config.gptq else {}
        for group in groups:
            _pack(block, group, config, hessians)

    return Recipe(calibrate=calibrate)


def _pack(block: Block, group: SharedInput, config: SVDQuantConfig, hessians: Mapping[str, Hessian]) -> None:
    found = absorb(parts_of(block, group.keys), group.inputs, iterations=config.iterations, share=config.share_branch)
    for key, factors, residual, packed in zip(group.keys, found.factors, found.residuals, found.packed, strict=True):
        matrix = block.matrices[key]
        if group.inputs is None and why_without_inputs(matrix) is None:
            block.note(key, "no token of the calibration data reaches it: decomposed by its weights alone")
        if key in hessians and hessians[key].tokens:
            packed = _by_gptq(block, key, residual, hessians[key], packed)
        block.pack(key, packed, factors if matrix.layer_spec.low_rank else None)


def _by_gptq(block: Block, key: str, residual: torch.Tensor, hessian: Hessian, nearest: PackedTensor) -> PackedTensor:
    """Codes of what the branch leaves, by the second moments of what they read; else the nearest, and a note."""
    matrix = block.matrices[key]
    try:
        result = gptq(residual, matrix.spec, as_read(matrix, hessian))
    except CholeskyError as problem:
        block.note(key, f"{problem}: rounded to nearest")
        return nearest
    if result.damping > 0.01:
        block.note(key, f"its Hessian needed damping={result.damping:g}")
    return result.packed
