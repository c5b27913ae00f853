"""Folding a scale per channel into weights: what one layer hands on is divided by it, what the next ones read from it
is multiplied by it, and the function stays the same.

SmoothQuant (arXiv 2211.10438, section 4), AWQ (arXiv 2306.00978) and OmniQuant's equivalent transformation
(arXiv 2308.13137) all end in this step. Heads that several query heads share (GQA), experts, routers and norms that
store their weight as an offset from one are [ours].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EXPERT_INPUTS = ("gate_up_proj", "gate_proj", "up_proj")  # fused experts' parameters that read the module's input
_Update = tuple[nn.Parameter, Tensor]


class FoldError(ValueError):
    """A scale that cannot be folded: not positive and finite, or modules that do not fit it."""


def fold_scale(
    previous: nn.Module,
    consumers: Sequence[nn.Module],
    scale: Tensor,
    *,
    repeat: int = 1,
    head_dim: int | None = None,
    offset: bool = False,
) -> None:
    """Divide the outputs of ``previous`` by ``scale`` and multiply the input columns of ``consumers`` by it, in place.

    Folding ``1 / scale`` undoes it. Nothing is changed when it raises.

    Args:
        previous: a norm with a weight ``[channels]`` (and a bias), a linear layer or a transformers Conv1D.
        consumers: **every** module that reads those outputs: linear layers, Conv1D, routers (any module with one weight
            ``[out, channels]``), fused experts (``gate_up_proj`` ``[experts, 2 * intermediate, channels]``).
        scale: ``[channels]``, positive. Computed with in float32 or, for ``previous`` and float64 weights, in float64.
        repeat: how often the consumers read each head of ``previous``, as query heads do that share a value head.
        head_dim: channels of a head; needed when ``repeat`` is not 1.
        offset: the norm multiplies by 1 + weight (Gemma).

    Raises:
        FoldError: a scale with zero, negative, NaN or infinite values or of another length; a module that nothing can
            be folded into; or a result that its parameter's type cannot hold.
    """
    updates = _divided(previous, scale, offset)
    for consumer in consumers:
        updates += _multiplied(consumer, expand_scale(scale, repeat, head_dim))
    _store(updates)


def divide_outputs(previous: nn.Module, scale: Tensor, *, offset: bool = False) -> None:
    """One half of :func:`fold_scale`: it changes the function. Arguments and errors as there."""
    _store(_divided(previous, scale, offset))


def multiply_inputs(consumer: nn.Module, scale: Tensor) -> None:
    """The other half, for inputs that are divided at run time; ``scale`` has the consumer's input channels."""
    _store(_multiplied(consumer, scale))


def expand_scale(scale: Tensor, repeat: int = 1, head_dim: int | None = None) -> Tensor:
    """``[channels]`` of ``previous`` -> ``[channels * repeat]`` of its consumers: each head ``repeat`` times in a row.

    Raises:
        FoldError: ``repeat`` without a ``head_dim`` that divides the channels.
    """
    if repeat == 1:
        return scale
    return scale.reshape(-1, _head(scale, repeat, head_dim)).repeat_interleave(repeat, 0).reshape(-1)


def gather_repeats(values: Tensor, repeat: int = 1, head_dim: int | None = None) -> Tensor:
    """Statistics of a consumer's inputs ``[channels * repeat]`` -> ``[repeat, channels]``, one row per query head that
    shares a head; a maximum or mean over the rows belongs to the channels that are scaled.

    Raises:
        FoldError: as :func:`expand_scale`.
    """
    if repeat == 1:
        return values[None]
    head = _head(values, repeat, head_dim, len(values))
    return values.reshape(-1, repeat, head).transpose(0, 1).reshape(repeat, -1)


def _head(values: Tensor, repeat: int, head_dim: int | None, length: int | None = None) -> int:
    channels = len(values) if length is None else length // repeat
    if repeat < 1 or not head_dim or channels % head_dim or (length or 0) % repeat:
        raise FoldError(f"repeat={repeat} needs a head_dim that divides the {channels} channels, not {head_dim}")
    return head_dim


def is_norm(module: nn.Module) -> bool:
    """Whether a module multiplies its output by a weight ``[channels]``, as far as its parameters tell."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.is_floating_point()


def output_channels(module: nn.Module) -> int | None:
    """Channels of the scale that the module's outputs can be divided by; None if nothing can be folded into it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return None
    if is_norm(module) or isinstance(module, nn.Linear):
        return weight.shape[0]
    return weight.shape[1] if _is_conv1d(module) else None


def input_weights(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The parameters that multiply the module's input, each with the dimension that holds the input channels."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
        found = [(weight, 0 if _is_conv1d(module) else 1)]
    else:
        experts = [getattr(module, name, None) for name in _EXPERT_INPUTS]
        dim = 1 if getattr(module, "is_transposed", False) else 2
        found = [(p, dim) for p in experts if isinstance(p, nn.Parameter) and p.dim() == 3]
    return found if all(parameter.is_floating_point() for parameter, _ in found) else []


def output_weights(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The parameters that make up the module's output, biases included, each with the dimension that holds the output
    channels: of linear layers, Conv1D, embeddings and fused experts."""
    if isinstance(getattr(module, "down_proj", None), nn.Parameter):
        dim = 2 if getattr(module, "is_transposed", False) else 1
        found = [(module.down_proj, dim), (getattr(module, "down_proj_bias", None), -1)]
    else:
        dim = 1 if _is_conv1d(module) or isinstance(module, nn.Embedding) else 0
        found = [(getattr(module, "weight", None), dim), (getattr(module, "bias", None), -1)]
    return [(parameter, dim) for parameter, dim in found if isinstance(parameter, nn.Parameter)]


def input_channels(module: nn.Module) -> int | None:
    """Channels of the scale that the module's inputs can be multiplied by; None if it cannot be a consumer."""
    widths = {parameter.shape[dim] for parameter, dim in input_weights(module)}
    return widths.pop() if len(widths) == 1 else None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _divided(module: nn.Module, scale: Tensor, offset: bool) -> list[_Update]:
    channels = output_channels(module)
    if channels is None:
        raise FoldError(f"a {type(module).__name__} has no outputs that a scale can be folded into")
    if offset and not is_norm(module):
        raise FoldError(f"offset=True is for norms, not for a {type(module).__name__}")
    s = _checked(scale, channels, module).double()
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = getattr(module, "bias", None)
    s = s.to(weight.device)
    values = weight.detach().double()
    if is_norm(module):
        new = (values + 1) / s - 1 if offset else values / s
    else:
        new = values / (s if _is_conv1d(module) else s.unsqueeze(1))
    updates = [(weight, new)]
    if bias is not None:
        updates.append((bias, bias.detach().double() / s))
    return [(parameter, new.to(parameter.dtype)) for parameter, new in updates]


def _multiplied(module: nn.Module, scale: Tensor) -> list[_Update]:
    parameters = input_weights(module)
    if not parameters:
        raise FoldError(f"a {type(module).__name__} has no input columns that a scale can be folded into")
    updates: list[_Update] = []
    for parameter, dim in parameters:
        compute = torch.promote_types(parameter.dtype, torch.float32)
        s = _checked(scale, parameter.shape[dim], module).to(parameter.device, compute)
        shape = [-1 if d == dim else 1 for d in range(parameter.dim())]
        updates.append((parameter, (parameter.detach().to(compute) * s.reshape(shape)).to(parameter.dtype)))
    return updates


def _checked(scale: Tensor, channels: int, module: nn.Module) -> Tensor:
    if scale.shape != (channels,):
        raise FoldError(
            f"a scale of shape {tuple(scale.shape)} does not fit the {channels} channels of a {type(module).__name__}"
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FoldError("the scale holds zero, negative, NaN or infinite values; clamp it first")
    return scale.detach()


@torch.no_grad()
def _store(updates: list[_Update]) -> None:
    for parameter, new in updates:
        if not bool(torch.isfinite(new).all()) and bool(torch.isfinite(parameter).all()):
            raise FoldError(f"the scale takes a parameter beyond what {parameter.dtype} can hold; use a smaller range")
    for parameter, new in updates:
        parameter.copy_(new)
