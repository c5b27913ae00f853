"""What is done to the state-space mixers of a block before their weights are rounded (Quamba, arXiv 2410.13229)."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.gains import fold_gain
from hf_lowbit.calibration.heads import online_hadamard
from hf_lowbit.calibration.scaling import block_sites
from hf_lowbit.nn import PackedLinear, PackedMixer
from hf_lowbit.rounding import round_to_nearest


def mixers_of(block: Block) -> dict[str, PackedMixer]:
    """Name in the block -> the packed mixer that takes, or took, the float one's place."""
    found = {matrix.layer: matrix.skeleton for matrix in block.matrices.values()}
    return {name: skeleton for name, skeleton in found.items() if isinstance(skeleton, PackedMixer)}


@torch.no_grad()
def fold_gains(block: Block) -> None:
    """Give the gain of every norm that mixers' input projections alone read to these: the function stays the same.

    For a block whose layers are all float. Which norms these are is found by trying
    (:mod:`hf_lowbit.calibration.sites`).
    """
    projections = {child_of(name, "in_proj") for name in mixers_of(block)}
    for site in block_sites(block, ("norm",)) if projections else ():
        if site.previous is not None and projections.issuperset(site.consumers):
            readers = [block.module.get_submodule(name) for name in site.consumers]
            fold_gain(block.module.get_submodule(site.previous), readers, lambda x: x)


@torch.no_grad()
def pack_mixers(block: Block) -> None:
    """Round what mixers have themselves, A_log and D, to nearest: they are in place then, their layers still float."""
    for name in mixers_of(block):
        for key in [key for key, matrix in block.matrices.items() if matrix.layer == name]:
            block.pack(key, round_to_nearest(block.matrices[key].weight, block.matrices[key].spec))


def rotate_outputs(block: Block, floats: bool = False) -> None:
    """Give mixers' output projections a Hadamard transform of their inputs, before they are packed.

    Args:
        floats: also where inputs are not quantized, for the sake of the weights.
    """
    projections = {child_of(name, "out_proj") for name in mixers_of(block)}
    for layer in [matrix.skeleton for matrix in block.matrices.values() if matrix.layer in projections]:
        if not isinstance(layer, PackedLinear) or not (floats or layer.layer_spec.activation is not None):
            continue
        if (transform := online_hadamard(layer.in_features)) is not None:
            layer.set_transform(transform)


def child_of(mixer: str, name: str) -> str:
    """The name in the block of a mixer's layer."""
    return f"{mixer}.{name}" if mixer else name
