"""Layers whose input is a concatenation along channels, such as the skip connections of a U-Net.

The parts may differ widely in range, and one scale for both erases the smaller one (Q-Diffusion, arXiv 2302.04304).
No class per model: one forward shows which layers read what ``torch.cat`` returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hf_lowbit.calibration.listening import layers_of_kind, told_inputs
from hf_lowbit.calibration.units import Batch, first_sample, without_cache

_CONCATENATE = (torch.cat, torch.concat, torch.concatenate)
_SAME_VALUES = (Tensor.contiguous, Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.clone)


@torch.no_grad()
def find_concatenations(model: nn.Module, batch: Batch) -> dict[str, tuple[int, ...]]:
    """Channels of each part of the inputs of linear and convolution layers that read a concatenation.

    Args:
        model: float, in evaluation mode.
        batch: keyword arguments of its forward; its first sample is run.

    Returns:
        Full layer name -> channels of the parts, at least two and in their order; of a concatenation within another
        the inner parts. A layer that is called with different parts is left out.
    """
    found: dict[str, set[tuple[int, ...]]] = {}

    def keep(name: str, module: nn.Module, x: Tensor) -> None:
        spatial = len(getattr(module, "kernel_size", ()))
        found.setdefault(name, set()).add(_parts(x, x.dim() - 1 - spatial))

    with _Concatenations(), told_inputs(layers_of_kind(model), keep):
        model(**first_sample(without_cache(model, batch)))
    return {name: parts for name, (parts, *others) in found.items() if not others and len(parts) > 1}


class _Concatenations(TorchFunctionMode):
    """Writes on tensors what they are concatenated of, and that a parameter had a part in them.

    Without the latter the sines and cosines of a timestep, which differ in nothing, would be a concatenation too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the function run, and look at what it returned."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if results and any(isinstance(x, nn.Parameter) or _is_learned(x) for x in tree_leaves((args, kwargs))):
            for tensor in results:
                tensor._lowbit_learned = True  # type: ignore[attr-defined]
            if func in _CONCATENATE:
                _remember(result, *_arguments(*args, **kwargs))
            elif func in _SAME_VALUES:
                result._lowbit_parts = getattr(args[0], "_lowbit_parts", None)
        return result


def _is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_lowbit_learned", False)


def _remember(result: Tensor, tensors: Any, dim: int) -> None:
    dim %= result.dim()
    sizes = [_parts(tensor, dim) for tensor in tensors if tensor.dim() == result.dim()]
    result._lowbit_parts = dim, tuple(size for part in sizes for size in part if size)  # type: ignore[attr-defined]


def _parts(x: Tensor, dim: int) -> tuple[int, ...]:
    """Sizes along a dimension of the parts of a tensor: one where it is no concatenation along it."""
    kept = getattr(x, "_lowbit_parts", None)
    return kept[1] if kept is not None and kept[0] == dim else (x.shape[dim],)


def _arguments(tensors: Any, dim: int = 0, axis: int | None = None, **out: Any) -> tuple[Any, int]:
    return tensors, dim if axis is None else axis
