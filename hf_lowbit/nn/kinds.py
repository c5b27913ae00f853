"""The registered kinds of packed module: what a plan may name. A plan never names an import path."""

from __future__ import annotations

from torch import nn

from hf_lowbit.nn.base import PackedModule
from hf_lowbit.nn.conv import PackedConv1d, PackedConv2d
from hf_lowbit.nn.embedding import PackedEmbedding
from hf_lowbit.nn.experts import PackedExperts, unsupported_experts
from hf_lowbit.nn.linear import PackedConv1D, PackedLinear
from hf_lowbit.nn.state_space.mamba import PackedMamba
from hf_lowbit.nn.state_space.mamba2 import PackedMamba2

_LAYERS = (PackedLinear, PackedConv1D, PackedConv1d, PackedConv2d, PackedEmbedding, PackedExperts)
_MIXERS = (PackedMamba, PackedMamba2)  # packed by methods that ask for it: see hf_lowbit.nn.state_space.names
KINDS: dict[str, type[PackedModule]] = {cls.kind: cls for cls in (*_LAYERS, *_MIXERS)}
_FLOAT_TYPES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Embedding: "embedding",
}


def register_kind(cls: type[PackedModule], float_type: type[nn.Module] | None = None) -> None:
    """Add a plugin's packed module. Raises ValueError if the kind's name is taken by another class."""
    if KINDS.setdefault(cls.kind, cls) is not cls:
        raise ValueError(f"kind {cls.kind!r} is already registered by {KINDS[cls.kind].__name__}")
    if float_type is not None:
        _FLOAT_TYPES[float_type] = cls.kind


def kind_of(module: nn.Module) -> str | None:
    """The kind that packs a float module; None for modules without weights to pack.

    Only exact types count: a subclass may read its weight in ways a packed module does not know.
    """
    if type(module) in _FLOAT_TYPES:
        return _FLOAT_TYPES[type(module)]
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return PackedConv1D.kind
    if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and unsupported_experts(module) is None:
        return PackedExperts.kind
    return None


def refusal_of(module: nn.Module) -> str | None:
    """Why a module with weights is not packed; None if it is or can be, or has none.

    Vectors (biases, norms) do not count as weights.
    """
    if isinstance(module, PackedModule) or kind_of(module) is not None:
        return None
    for float_type in _FLOAT_TYPES:
        if isinstance(module, float_type):
            return f"{type(module).__name__} is a subclass of {float_type.__name__} with behaviour of its own"
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{type(module).__name__} is not supported"
    owned = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    if owned and ("experts" in type(module).__name__.lower() or hasattr(module, "down_proj")):
        return unsupported_experts(module) or f"{type(module).__name__} holds fused weights that are not supported"
    matrices = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    return f"{type(module).__name__} computes with its {', '.join(matrices)} itself" if matrices else None
