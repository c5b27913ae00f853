"""Whether a kernel may be called directly, or something has to see an operator instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ORDINARY = (Tensor, nn.Parameter)


def is_eager(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, and nothing is traced, transformed or listened to.

    False under torch.compile, export, make_fx and jit.trace, within torch.func's transforms and dispatch modes, and for
    subclasses of Tensor: kernels called by address would leave no trace there, or read what is not there.
    """
    return not torch.compiler.is_compiling() and is_untouched(x)


def is_untouched(x: Tensor) -> bool:
    """:func:`is_eager`, asked where nothing is compiled."""
    return type(x) in _ORDINARY and not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )
