"""Layers that read a concatenation get scales of their own for each part of it, of weights and of inputs.

The halves that a U-Net's skip connection joins differ widely in range, and one scale for both erases the smaller one
(Q-Diffusion, arXiv 2302.04304). The parts are groups here: as wide as divides all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from hf_lowbit.calibration.block import Block
from hf_lowbit.nn import LayerSpec


def split_layers(block: Block, parts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Give the block's layers that read a concatenation groups which no two parts share. Before they are packed.

    Args:
        parts: full layer name -> channels of each part
            (:func:`hf_lowbit.calibration.concatenations.find_concatenations`).

    Returns:
        Key of :attr:`Block.matrices` -> columns of each part, for those that had no groups of their own: their weights
        are to have one scale per row and part (:func:`hf_lowbit.rounding.parts.round_parts`).
    """
    whole: dict[str, tuple[int, ...]] = {}
    for key, matrix in block.matrices.items():
        channels = parts.get(block.full_name(matrix.layer))
        if channels is None or matrix.weight.shape[1] % sum(channels):  # a convolution of several groups
            continue
        kernel = matrix.weight.shape[1] // sum(channels)
        widths = tuple(width * kernel for width in channels)
        if not isinstance(matrix.spec.group_size, int):
            whole[key] = widths
        matrix.skeleton.layer_spec = grouped_by_part(matrix.layer_spec, widths)
    return whole


def grouped_by_part(spec: LayerSpec, widths: tuple[int, ...]) -> LayerSpec:
    """The specification with groups that lie within parts of ``widths`` columns."""
    own = spec.weight.group_size
    group = math.gcd(*widths, own) if isinstance(own, int) else math.gcd(*widths)
    activation = None if spec.activation is None else replace(spec.activation, group_size=group)
    return replace(spec, weight=replace(spec.weight, group_size=group), activation=activation)
