"""PackedTensor: codes and their companions, and how they decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.formats.number_format import look_up
from hf_lowbit.formats.packing import unpack_codes
from hf_lowbit.formats.spec import SCALE_DTYPES, WeightSpec, bit_pattern_dtype

_CHUNK_ELEMENTS = 1 << 20


@dataclass
class PackedTensor:
    """A quantized matrix (or stack of matrices) as it lies in memory and on disk.

    Attributes:
        weight: int32 ``[..., rows, packed_columns]``.
        scale: ``[..., rows or 1, groups]``, bit patterns of the spec's scale type (int16, or int32 for float32).
        zero_point: None; packed int32 codes for integer grids; bit patterns like ``scale`` for other tables.
        table: None, or int32 ``[2^bits]``, bit patterns of a float32 table fitted to this tensor.
        spec: how to read them.
        columns: inputs per row.
    """

    weight: Tensor
    scale: Tensor
    spec: WeightSpec
    columns: int
    zero_point: Tensor | None = None
    table: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> tensor, "" for the codes; the suffixes of :meth:`WeightSpec.companions`."""
        stored = {"": self.weight, "_scale": self.scale, "_zero_point": self.zero_point, "_table": self.table}
        return {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}

    def __getitem__(self, index: int) -> PackedTensor:
        """One matrix of a stack."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return PackedTensor(self.weight[index], self.scale[index], self.spec, self.columns, zero_point, self.table)

    def rows(self, index: slice | Tensor) -> PackedTensor:
        """Some rows of a matrix, by slice or by a 1-D index tensor; one scale for the whole tensor stays shared."""

        def select(tensor: Tensor) -> Tensor:  # unlike tensor[index], index_select refuses negative rows
            return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)

        one_scale = self.spec.group_size == "tensor" and self.scale.shape[0] == 1
        scale = self.scale if one_scale else select(self.scale)
        zero_point = self.zero_point if one_scale or self.zero_point is None else select(self.zero_point)
        return PackedTensor(select(self.weight), scale, self.spec, self.columns, zero_point, self.table)


def to_bits(values: Tensor, dtype_name: str) -> Tensor:
    """float32 values rounded to ``dtype_name`` and viewed as integers."""
    dtype = SCALE_DTYPES[dtype_name]
    return values.to(dtype).contiguous().view(bit_pattern_dtype(dtype))


def from_bits(bits: Tensor, dtype_name: str) -> Tensor:
    """Inverse of :func:`to_bits`, as float32."""
    return bits.view(SCALE_DTYPES[dtype_name]).float()


def scales(packed: PackedTensor) -> Tensor:
    """float32 scales ``[..., rows or 1, groups]``."""
    return from_bits(packed.scale, packed.spec.scale_dtype)


def zero_points(packed: PackedTensor) -> Tensor | None:
    """float32 zero points in table units, shaped like the scales; None for symmetric formats."""
    if packed.zero_point is None:
        return None
    if packed.spec.has_integer_zero_point:
        codes = unpack_codes(packed.zero_point, packed.spec.bits, packed.scale.shape[-1])
        return packed.spec.number_format.decode(codes)
    return from_bits(packed.zero_point, packed.spec.scale_dtype)


def table_of(packed: PackedTensor) -> Tensor:
    """float32 ``[2^bits]``: the stored table, or the format's."""
    if packed.table is not None:
        return packed.table.view(torch.float32)
    return packed.spec.number_format.table.to(packed.weight.device)


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized matrix ``[..., rows, columns]``: scale * (table[code] - zero_point), in float32, rounded once."""
    if packed.weight.dim() > 2:
        return torch.stack([decode(packed[index], dtype) for index in range(packed.weight.shape[0])])
    rows = packed.weight.shape[0]
    values = torch.empty(rows, packed.columns, dtype=dtype, device=packed.weight.device)
    step = max(1, _CHUNK_ELEMENTS // packed.columns)
    for start in range(0, rows, step):
        values[start : start + step] = decode_rows(packed, slice(start, start + step))
    return values


def decode_rows(packed: PackedTensor, rows: slice | Tensor) -> Tensor:
    """float32 rows ``[n, columns]`` of a packed matrix, by slice or by a 1-D index tensor."""
    selected = packed.rows(rows)
    spec = packed.spec
    codes = unpack_codes(selected.weight, spec.bits, packed.columns, spec.packing)
    scale, zero_point = scales(selected), zero_points(selected)
    values = look_up(table_of(packed), codes).unflatten(-1, (scale.shape[-1], -1))
    if zero_point is not None:
        values -= zero_point.unsqueeze(-1)
    values *= scale.unsqueeze(-1)
    return values.reshape(codes.shape)
