"""Linear layers whose codes are no inputs of compiled graphs: fewer of them to hand over before every token."""

from __future__ import annotations

from torch import nn

from hf_lowbit.kernels import KeptMatrix
from hf_lowbit.kernels.cpu import gather_in_large_pages
from hf_lowbit.nn.linear import PackedLinear


def keep_matrices(model: nn.Module) -> int:
    """Let graphs that are compiled from now on know packed linear layers on a CPU by numbers; returns how many.

    What such a layer stores is moved into large pages of memory, once, and has to stay there: when the model is moved
    or a layer's codes are replaced, graphs that know them refuse to run. Layers of a forced backend, or whose inputs do
    not bring their scales, are not among them.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear) and _may_be_kept(module)]
    new = [layer for layer in layers if layer.kept is None or not layer.kept.is_of(layer.packed())]
    gather_in_large_pages(tensor for layer in new for tensor in layer.packed().tensors().values())
    for layer in new:
        layer.kept = KeptMatrix(layer.packed())
    return len(layers)


def _may_be_kept(layer: PackedLinear) -> bool:
    activation = layer.layer_spec.activation
    brings_scales = activation is None or activation.brings_scales
    return layer.is_packed() and layer.weight.device.type == "cpu" and layer.backend is None and brings_scales
