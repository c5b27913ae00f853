"""ViDiT-Q's balancing of channels between inputs and weights, one static scale for all timesteps.

s = A^alpha / max|W|^(1 - alpha) per channel, A being the mean over batches of the largest |x| (Zhao et al., arXiv
2406.02540, and the authors' code). What it leaves is spread by a Hadamard transform, where that is asked for (the
paper's later version [U]). The scale is folded into what comes before where that is exact, and is a transform of the
layers' input elsewhere: behind a norm that a timestep modulates, that is.
"""

from __future__ import annotations

import torch

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.heads import online_hadamard
from hf_lowbit.calibration.smoothing import SharedInput, put_scale, ranges_of, shared_inputs
from hf_lowbit.calibration.statistics import MeanPeak
from hf_lowbit.nn import PackedLinear, Scaling
from hf_lowbit.nn.transforms import ScaledHadamard
from hf_lowbit.transforms.scales import smoothing_scale


@torch.no_grad()
def balance_inputs(block: Block, alpha: float | None, rotate: bool) -> None:
    """Balance, and rotate, what the block's linear layers read. Before any of it is packed.

    Args:
        alpha: 0 leaves the whole difficulty to the inputs, 1 to the weights; None: no balancing.
        rotate: whether a Hadamard transform follows.

    Raises:
        FoldError: a scale that a parameter before the layers cannot hold.
    """
    for group in shared_inputs(block, MeanPeak):
        if not group.is_linear:
            for key in group.keys:
                kind = block.matrices[key].skeleton.kind
                block.note(key, f"layers of kind {kind!r} are not balanced: rounded as they are")
            continue
        if alpha is not None and group.maximum is not None:
            put_scale(block, group, smoothing_scale(*ranges_of(block, group), alpha))
        if rotate:
            _rotate(block, group)


def _rotate(block: Block, group: SharedInput) -> None:
    """Let a Hadamard transform follow on what the layers do with their input so far."""
    for key in group.keys:
        layer = block.matrices[key].skeleton
        assert isinstance(layer, PackedLinear)
        rotation = online_hadamard(layer.in_features)
        if rotation is None:
            block.note(key, f"no Hadamard matrix for {layer.in_features} inputs: they are not rotated")
        elif layer.layer_spec.transform == Scaling():
            layer.set_transform(ScaledHadamard(rotation.order), layer.transform_tensors())
        else:
            layer.set_transform(rotation)
