"""The order in which a block's layers are called."""

from __future__ import annotations

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.scaling import first_sequence
from hf_lowbit.calibration.sites import shared_inputs


def call_groups(block: Block) -> list[list[str]]:
    """Keys of the block's matrices, those that read the same tensor together, in the order of their calls.

    Layers that the first sequence does not reach come last.
    """
    layers: dict[str, list[str]] = {}
    for key, matrix in block.matrices.items():
        layers.setdefault(matrix.layer, []).append(key)
    groups = shared_inputs(block.module, *first_sequence(block), list(layers))
    return [[key for layer in group for key in layers[layer]] for group in groups]
