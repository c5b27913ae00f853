"""Linear layers whose codes are no inputs of compiled graphs: fewer of them to hand over before every token."""

from __future__ import annotations

from torch import nn

from hf_lowbit.kernels import KeptMatrix
from hf_lowbit.nn.linear import PackedLinear


def keep_matrices(model: nn.Module) -> int:
    """Let graphs that are compiled from now on know packed linear layers on a CPU by numbers; returns how many.

    What such a layer stores has to stay where it is: a graph goes on with what it was compiled with. Layers of a forced
    backend, or whose inputs do not bring their scales, are not among them.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, PackedLinear) and _may_be_kept(module):
            packed = module.packed()
            if module.kept is None or not module.kept.is_of(packed):
                module.kept = KeptMatrix(packed)
            count += 1
    return count


def _may_be_kept(layer: PackedLinear) -> bool:
    activation = layer.layer_spec.activation
    brings_scales = activation is None or activation.brings_scales
    return layer.is_packed() and layer.weight.device.type == "cpu" and layer.backend is None and brings_scales
