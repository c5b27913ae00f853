"""What puts a model back as it was."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def remember(model: nn.Module, copied: torch.dtype | None = None) -> Callable[[], None]:
    """What puts parameters and floating buffers back: the same objects with the same values, in the same places.

    Values that are changed in place since then are restored only where they are copied.

    Args:
        copied: tensors of this type are copied; of the others it is remembered which storage they had.
    """
    places = [(m, name, parameter) for m in model.modules() for name, parameter in m._parameters.items()]
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    values = [t.data.clone() if t.dtype == copied and not t.is_meta else t.data for t in tensors]

    def restore() -> None:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data = value

    return restore
