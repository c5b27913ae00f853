"""The parameters of a module's norms."""

from __future__ import annotations

from torch import nn

from hf_lowbit.transforms.fold import is_norm


def norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weights and biases of all norms; of what several share, once.

    Not of group norms: with channels last and an input that needs no gradient, theirs crash torch 2.13.
    """
    owners = {n for n, part in module.named_modules() if is_norm(part) and not isinstance(part, nn.GroupNorm)}
    return {name: p for name, p in module.named_parameters() if name.rpartition(".")[0] in owners and p.dim() == 1}
