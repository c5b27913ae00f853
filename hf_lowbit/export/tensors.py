"""Packed tensors as compressed-tensors stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.export.scheme import Scheme
from hf_lowbit.formats import PackedTensor, unpack_codes
from hf_lowbit.formats.packed import scales


def compressed(packed: PackedTensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameter name -> tensor of one matrix ``[rows, columns]``.

    Args:
        packed: integers on a grid.
        scheme: of its layer.
        dtype: of the scales, in which they are exact.

    Returns:
        ``weight_scale`` ``[rows, groups]``; for packed storage ``weight_packed`` int32 ``[rows, words]`` and
        ``weight_shape`` int64 ``[2]``, else ``weight`` int8 ``[rows, columns]``; with zero points
        ``weight_zero_point``, int32 ``[words, groups]`` packed along the rows, or int8 ``[rows, groups]``.
    """
    rows = packed.weight.shape[0]
    scale = scales(packed).to(dtype)
    tensors = {"weight_scale": scale.expand(rows, -1).contiguous()}  # one scale for the tensor is repeated
    if scheme.quantized_input:
        tensors["weight"] = _signed(packed.weight, scheme.bits, packed.columns)
    else:
        tensors["weight_packed"] = packed.weight.contiguous()  # the same words
        tensors["weight_shape"] = torch.tensor([rows, packed.columns])
    if packed.zero_point is not None:
        zero_point = _signed(packed.zero_point, scheme.bits, scale.shape[-1]).expand(rows, -1)
        tensors["weight_zero_point"] = zero_point.contiguous() if scheme.quantized_input else _down(zero_point, scheme)
    return {name: _alone(tensor.detach().cpu()) for name, tensor in tensors.items()}


def _signed(words: Tensor, bits: int, columns: int) -> Tensor:
    """int8 values of packed codes, which count from the lowest value."""
    return (unpack_codes(words, bits, columns).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _alone(tensor: Tensor) -> Tensor:
    """With a storage of its own: a file holds whole storages, an expert is part of one."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _down(zero_point: Tensor, scheme: Scheme) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(zero_point.contiguous(), scheme.bits, packed_dim=0).contiguous()
