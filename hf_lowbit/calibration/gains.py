"""Norms without gain: what a norm multiplies by and adds goes into the layers that read it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.stream import StreamError
from hf_lowbit.transforms.fold import input_weights
from hf_lowbit.transforms.rotation import Rotation

_TOLERANCE = 1e-4  # norms compute in float32
_ROWS = 256  # changed at once in float64


def gain_offset(norm: nn.Module) -> float:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight (Gemma).

    Raises:
        StreamError: it does something else.
    """
    for offset in (0.0, 1.0):
        if not bool(_with_weight(norm, -offset)(_sample(norm)).any()):
            return offset
    raise StreamError(f"a {type(norm).__name__} does not multiply by its weight")


def commutes(norm: nn.Module, rotation: Rotation) -> bool:
    """Whether rotating before the norm, its gain and bias left out, is the same as after it."""
    plain, x = _with_weight(norm, 1.0 - gain_offset(norm)), _sample(norm)
    before, after = plain(rotation(x).to(x.dtype)), rotation(plain(x)).to(x.dtype)
    return bool((before - after).norm() <= _TOLERANCE * after.norm())


def fold_gain(norm: nn.Module, readers: Sequence[nn.Module], rotation: Rotation) -> None:
    """Give the gain and bias of a norm to its readers, whose inputs are then rotated.

    Where a reader has no bias (an output head), the norm keeps one: b / gain, rotated [ours].

    Raises:
        StreamError: such a norm has a gain of zero where it has a bias.
    """
    offset = gain_offset(norm)
    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    gain = weight.double() + offset
    if bias is not None and bool(bias.any()):
        shift = bias.double()
        if all(_has_bias(reader) for reader in readers):
            for reader in readers:
                (matrix, dim), own = input_weights(reader)[0], reader.get_parameter("bias")
                own.data = (own.double() + matrix.double().movedim(dim, -1) @ shift).to(own.dtype)
            bias.data = torch.zeros_like(bias)
        elif bool((shift[gain == 0] != 0).any()):
            raise StreamError(f"a {type(norm).__name__} adds a bias where it multiplies by zero")
        else:
            bias.data = rotation(torch.where(gain == 0, 0.0, shift / gain)).to(bias.dtype)
    for reader in readers:
        for parameter, dim in input_weights(reader):
            parameter.data = in_float64(parameter.data, dim, lambda rows: rows.double() * gain)
    weight.data = torch.full_like(weight, 1.0 - offset)


def in_float64(values: Tensor, dim: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Vectors along a dimension, changed in float64, some at a time: it takes space. Returned in float32 at least.

    Args:
        change: ``[vectors, channels]`` -> the same shape in float64.
    """
    moved = values.movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    new = torch.empty_like(rows, dtype=torch.promote_types(values.dtype, torch.float32))
    for part, changed in zip(rows.split(_ROWS), new.split(_ROWS), strict=True):
        changed.copy_(change(part))
    return new.reshape(moved.shape).movedim(-1, dim).contiguous()


def _has_bias(reader: nn.Module) -> bool:
    bias = reader._parameters.get("bias")
    return bias is not None and bias.dim() == 1 and len(input_weights(reader)) == 1


def _with_weight(norm: nn.Module, value: float) -> nn.Module:
    """A copy without bias."""
    copied = copy.deepcopy(norm)
    nn.init.constant_(copied.get_parameter("weight"), value)
    if isinstance(bias := copied._parameters.get("bias"), nn.Parameter):
        nn.init.zeros_(bias)
    return copied


def _sample(norm: nn.Module) -> Tensor:
    weight = norm.get_parameter("weight")
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
    return x.to(weight.device, weight.dtype)
