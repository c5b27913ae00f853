"""Inputs become codes with scales of their own, natively: torch takes eight operations for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.cpu.library import load
from hf_lowbit.kernels.cpu.products import FLOAT_TYPES


def quantizes(x: Tensor, activation: ActivationSpec) -> bool:
    """Whether :func:`quantize_tokens` takes these: CPU inputs, and integers that bring their scales."""
    return activation.brings_scales and x.device.type == "cpu" and x.dtype in FLOAT_TYPES and load() is not None


def quantize_tokens(x: Tensor, activation: ActivationSpec) -> tuple[Tensor, Tensor]:
    """int8 codes ``[tokens, columns]`` and float32 scales ``[tokens, groups]`` of float ``[tokens, columns]``.

    Those of :func:`hf_lowbit.kernels.quantize_tokens` to the last bit.

    Raises:
        SpecError: a group that does not divide the columns.
    """
    library = load()
    assert library is not None  # callers ask quantizes() first
    x = x.contiguous()
    tokens, columns = x.shape
    groups, limit = activation.groups(columns), int(activation.limit)
    codes = torch.empty(tokens, columns, dtype=torch.int8)
    scales = torch.empty(tokens, groups)
    places = x.data_ptr(), FLOAT_TYPES[x.dtype], tokens, columns, groups, limit, codes.data_ptr(), scales.data_ptr()
    if columns and library.hfl_quantize(*places):
        raise ValueError("the native kernel refused its arguments")
    return codes, scales
